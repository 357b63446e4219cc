"""``sollold completion``: scripts for shells, and the man page, from the parser itself."""

from __future__ import annotations

import argparse
import sys

from sollold import __version__
from sollold.cli.exit import Exit
from sollold.cli.parser import EXIT_CODES, parser


def completion(options: argparse.Namespace) -> int:
    """Print what was asked for."""
    if options.shell == "man":
        print(man_page(), end="")
        return Exit.DONE
    try:
        import shtab
    except ImportError:
        print("sollold: completion scripts need shtab: pip install shtab", file=sys.stderr)
        return Exit.FAILED
    print(shtab.complete(parser(), shell=options.shell))
    return Exit.DONE


def man_page() -> str:
    """The manual in man(7)'s form."""
    top = parser()
    lines = [
        f'.TH SOLLOLD 1 "" "sollold {__version__}" "User Commands"',
        ".SH NAME",
        "sollold \\- large language models run by the machines of a LAN together",
        ".SH SYNOPSIS",
        ".B sollold\n.I COMMAND\n.RI [ options ]",
        ".SH DESCRIPTION",
        "One daemon runs on each machine. The daemons find each other, know what memory each has, and "
        "together run GGUF models that none of them could hold alone. Any node answers HTTP requests in "
        "the dialects of Ollama, OpenAI and Anthropic, on port 11435.",
        ".SH COMMANDS",
    ]
    for name, sub in _commands(top).items():
        lines += [".SS", f".B sollold {name}", sub.description or ""]
        for action in sub._actions:
            if action.help == argparse.SUPPRESS or "-h" in action.option_strings:
                continue
            flags = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            if action.option_strings and action.nargs != 0:
                flags += f" {action.metavar or action.dest.upper()}"
            lines += [".TP", f".B {_escaped(flags)}", _escaped(action.help or "")]
    lines += [".SH EXIT STATUS", ".nf", *map(_escaped, EXIT_CODES.splitlines()[1:]), ".fi"]
    lines += [
        ".SH FILES",
        ".TP\n.I /etc/sollold/sollold.toml\nSettings; every key is shown there with its default.",
        ".TP\n.I /var/lib/sollold\nIdentity, logs of deployments, and models (in its folder models).",
        ".TP\n.I /var/cache/sollold\nllama.cpp and the workers' tensors; may be deleted.",
        ".SH ENVIRONMENT",
        ".TP\n.B SOLLOLD_SECTION_KEY\nSets a setting: [http] port is SOLLOLD_HTTP_PORT.",
        ".TP\n.B SOLLOLD_NODE_URL\nThe node that commands ask.",
        ".TP\n.B SOLLOLD_CONFIG\nThe settings file to read.",
    ]
    return "\n".join(lines) + "\n"


def _commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\\\").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
