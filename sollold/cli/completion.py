"""``sollold completion``: shell completion scripts and the man page, generated from the parser."""

from __future__ import annotations

import argparse
import re
import sys

from sollold import __version__
from sollold.cli.completed import lister, needed_before
from sollold.cli.exit import Exit
from sollold.cli.fish import fish_script
from sollold.cli.parser import ALIASES, EXIT_CODES, parser, subcommands

_FUNCTIONS = {
    "bash": """
{name}() {{ {unless}_sollold_names "$1" < <(timeout 3 {words} 2>/dev/null); }}
""",
    "zsh": """
{name}() {{ {unless}compadd -- ${{(f)"$(timeout 3 {words} 2>/dev/null)"}}; }}
""",
}
"""Shell function that completes values known to the daemon; one that hangs must not block the shell."""
_CONDITIONS = {
    "bash": '[[ " ${{COMP_WORDS[*]}} " == *" {before} "* ]] && ',
    "zsh": "(( ${{words[(Ie){before}]}} )) && ",
}
_NAMES = """
# Names come from other machines: `compgen -W` would execute commands in them.
_sollold_names() {
  local name
  while IFS= read -r name; do
    [[ $name == "$1"* ]] && printf '%s\\n' "$name"
  done
}
"""
_WHOLE_NAMES = """
# bash ends a word at a colon, which model names contain: join the words again, and remove the part already
# typed from the completions.
_sollold() {
  local -a words=()
  local at place=0 glue=
  for (( at = 0; at < ${#COMP_WORDS[@]}; at++ )); do
    if [[ -n $glue || ${COMP_WORDS[at]} == : && at -gt 1 ]]; then
      words[${#words[@]}-1]+=${COMP_WORDS[at]}
      glue=
      [[ ${COMP_WORDS[at]} == : ]] && glue=1
    else
      words+=("${COMP_WORDS[at]}")
    fi
    (( at <= COMP_CWORD )) && place=$(( ${#words[@]} - 1 ))
  done
  COMP_WORDS=("${words[@]}")
  COMP_CWORD=$place
  local word=${COMP_WORDS[COMP_CWORD]}
  _shtab_sollold "$@"
  [[ $word == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*:}"}"}")
}
complete -o filenames -F _sollold sollold
"""


def completion(options: argparse.Namespace) -> int:
    """Print the completion script or the man page."""
    if options.shell == "man":
        print(man_page(), end="")
        return Exit.DONE
    if options.shell == "fish":
        print(fish_script(), end="")
        return Exit.DONE
    try:
        import shtab
    except ImportError:
        print(
            "sollold: completion scripts need shtab: pip install shtab, or pipx inject sollold shtab",
            file=sys.stderr,
        )
        return Exit.FAILED
    top = parser()
    functions = {}
    for command, words in {"": top, **subcommands(top)}.items():
        for action in words._actions:
            if listing := lister(command, action):
                subcommand = needed_before(command, action)
                name = "_" + re.sub(r"[^a-z]+", "_", f"{listing} {subcommand}".strip())
                functions[name] = _function(options.shell, name, listing, subcommand)
                action.complete = {"bash": name, "zsh": name}  # type: ignore[attr-defined]
    names = _NAMES if options.shell == "bash" else ""
    print(shtab.complete(top, shell=options.shell, preamble=names + "".join(functions.values())))
    if options.shell == "bash":
        print(_WHOLE_NAMES, end="")
    return Exit.DONE


def _function(shell: str, name: str, words: str, subcommand: str) -> str:
    condition = _CONDITIONS[shell].format(before=subcommand) if subcommand else ""
    return _FUNCTIONS[shell].format(name=name, words=words, unless=condition)


def man_page() -> str:
    """The manual page in man(7) format."""
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
    for name, sub in subcommands(top).items():
        if name in ALIASES:
            continue
        lines += [".SS", f".B sollold {name}", sub.description or ""]
        for action in sub._actions:
            if action.help == argparse.SUPPRESS or "-h" in action.option_strings:
                continue
            flags = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            if action.option_strings and action.nargs != 0:
                flags += f" {action.metavar or action.dest.upper()}"
            lines += [".TP", f".B {_escaped(flags)}", _escaped(action.help or "")]
        if sub.epilog:
            lines += [".PP", ".nf", *map(_escaped, sub.epilog.splitlines()), ".fi"]
    lines += [".SH EXIT STATUS", ".nf", *map(_escaped, EXIT_CODES.splitlines()[1:]), ".fi"]
    lines += [
        ".SH FILES",
        ".TP\n.I /etc/sollold/sollold.toml\nSettings; every key is shown there with its default.",
        ".TP\n.I /var/lib/sollold\nIdentity, logs of deployments, and models (in its folder models).",
        ".TP\n.I /var/cache/sollold\nllama.cpp and the workers' tensors; may be deleted.",
        ".SH ENVIRONMENT",
        ".TP\n.B SOLLOLD_SECTION_KEY\nSets a setting: [http] port is SOLLOLD_HTTP_PORT.",
        ".TP\n.B SOLLOLD_NODE_URL\nThe node that commands ask.",
        ".TP\n.B SOLLOLD_API_KEY\nThe API key that commands show a node.",
        ".TP\n.B SOLLOLD_CA\nThe file with the authority of certificates to trust.",
        ".TP\n.B SOLLOLD_CONFIG\nThe settings file to read.",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\\\").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
