"""The command-line parser. It imports no command, so that help and completion are fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from sollold.cli.commands import JSON, NODE, add_commands, settings_options
from sollold.did_you_mean import did_you_mean

EXIT_CODES = """exit status:
  0  done
  1  failed
  2  invalid command line or setting
  3  no daemon answers
  4  no such model, node, machine or key
  5  the model does not fit (the message says what is missing)"""


ALIASES = {
    "list": "models",
    "ls": "models",
    "rm": "delete",
    "cp": "copy",
    "stop": "unload",
    "serve": "run",
}
"""Ollama's commands, and the ones that replace them here."""
_MIN_SIMILARITY = 0.7
"""Minimum similarity, up to 1, of a mistyped word to its suggestion."""
_OF_DAEMON = (
    *("config", "set", "port", "peer_port", "host", "name", "memory_limit", "models", "seed"),
    *("log_level", "demo_model"),
)
_OF_CHAT = ("system", "think")
"""Arguments of ``run`` that only starting a daemon uses, and those that only a chat uses."""
PROMPTED = ("chat", "run")
"""Commands whose arguments after the model are a prompt."""


class _Parser(argparse.ArgumentParser):
    """Names missing arguments as help does."""

    _MISSING = "the following arguments are required: "

    def error(self, message: str) -> NoReturn:
        if message.startswith(self._MISSING):
            choices = {
                action.dest: f"one of {', '.join(map(str, action.choices))}"
                for action in self._actions
                if action.choices and not action.option_strings
            }
            names = message.removeprefix(self._MISSING).split(", ")
            message = f"missing {' and '.join(choices.get(name, name) for name in names)}"
        super().error(message)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments. Exits the program if they are invalid (2), or after ``--help``."""
    top = parser()
    words = list(sys.argv[1:] if words is None else words)
    _check_command(top, words)
    options, rest = top.parse_known_args(words)
    # argparse returns these separately when an option stands between the model and the prompt.
    if options.command in PROMPTED and not any(word.startswith("-") for word in rest):
        options.prompt += rest
    elif rest:
        sub = subcommands(top)[options.command]
        sub.error(f"unrecognized arguments: {' '.join(rest)}{_near_option(sub, rest)}")
    options.typed = options.command
    options.command = ALIASES.get(options.command, options.command)
    if options.command == "run":
        _check_run(top, options)
    if not options.asks and (options.node or getattr(options, "json", False)) and options.command != "config":
        top.error(f"{options.typed} asks no node: leave out --node and --json")
    return options


def _check_command(top: argparse.ArgumentParser, words: list[str]) -> None:
    """Refuse an unknown command, suggesting the nearest. ``help`` and no argument become ``--help``."""
    commands = subcommands(top)
    index = 0
    while index < len(words) and words[index].startswith("-"):
        index += 2 if words[index] == "--node" else 1
    if not words:
        words[:] = ["--help"]
    elif words[index : index + 1] == ["help"]:
        words[:] = [*(word for word in words[index + 1 : index + 2] if word != "help"), "--help"]
        index = 0
    if index >= len(words) or words[index] == "--help" or words[index] in commands:
        return
    word = words[index].lower()
    # `sollold evict bert`: the group before a subcommand is easily forgotten.
    owner = next((name for name, sub in commands.items() if word in _first_choices(sub)), "")
    hint = f"; did you mean {owner} {word}?" if owner else did_you_mean(word, commands, _MIN_SIMILARITY)
    top.error(f"unknown command {words[index]!r}{hint} (`sollold help` lists all commands)")


def _first_choices(sub: argparse.ArgumentParser) -> list[str]:
    """The possible first arguments of a command; empty if anything may follow."""
    first = next((action for action in sub._actions if not action.option_strings), None)
    return [str(choice) for choice in first.choices] if first is not None and first.choices else []


def _near_option(sub: argparse.ArgumentParser, words: list[str]) -> str:
    """A hint if one of ``words`` is almost an option of a command; else empty."""
    options = sub._option_string_actions
    hints = (did_you_mean(word.partition("=")[0], options) for word in words if word.startswith("-"))
    return next(filter(None, hints), "")


def _check_run(top: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check ``run``: with a model it queries a daemon, alone it starts one."""
    if options.typed == "serve" and options.model:
        top.error("serve takes no model; did you mean: sollold run MODEL?")
    useless = [
        action.option_strings[-1]
        for action in subcommands(top)[options.typed]._actions
        if action.dest in (_OF_DAEMON if options.model else _OF_CHAT)
        and getattr(options, action.dest) != action.default
    ]
    if useless and options.model:
        top.error(f"{', '.join(useless)}: only without a MODEL; --node HOST:PORT names the daemon to ask")
    if useless:
        top.error(f"{', '.join(useless)}: only with a MODEL")
    if options.model:
        options.command, options.asks = "chat", True


def subcommands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """All commands and aliases, by name."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


class _Version(argparse.Action):
    """Determines the version only on demand, since a checkout has to run git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from sollold.cli.own_version import own_version

        print(f"sollold {own_version()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Build the parser with all commands and options."""
    top = _Parser(
        prog="sollold",
        description="The machines of a LAN run large language models together.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "-v", "--version", action=_Version, nargs=0, help="show program's version number and exit"
    )
    # These may precede or follow the command; after it, omitted options must not reset given ones.
    top.add_argument("--node", metavar="NODE", default="", help=NODE)
    top.add_argument("--json", action="store_true", help=JSON)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)

    def command(
        name: str, text: str, *, asks: bool = True, settings: bool = True, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            aliases=aliases.get(name, []),
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=more or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(asks=asks)
        if asks:
            sub.add_argument("--node", metavar="NODE", default=argparse.SUPPRESS, help=NODE)
            sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON)
        elif settings:
            settings_options(sub)
        return sub

    add_commands(command)
    return top
