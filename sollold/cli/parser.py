"""The command line's words. Built without any command's imports, so that help and completion are quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from sollold import __version__
from sollold.units import parse_seconds

EXIT_CODES = """exit status:
  0  done
  1  it was tried and failed
  2  wrong words on the command line, or a wrong setting
  3  no daemon answers
  4  there is no such model
  5  the model does not fit, and the message says what is missing"""


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options. Ends the program when they are wrong (2), or after ``--help``."""
    top = parser()
    options, rest = top.parse_known_args(words)
    # What argparse leaves over when an option stands between the model and the prompt.
    if options.command == "chat" and not any(word.startswith("-") for word in rest):
        options.prompt += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="sollold",
        description="The machines of a LAN run large language models together.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"sollold {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, text: str, *, asks: bool = True, settings: bool = True, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=more or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if asks:
            sub.add_argument(
                "--node",
                metavar="URL",
                help="the node to ask (default: $SOLLOLD_NODE_URL, else this machine)",
            )
            sub.add_argument("--json", action="store_true", help="print JSON for programs")
        elif settings:
            _settings_options(sub)
        return sub

    _serving_commands(command)
    _asking_commands(command)
    return top


def _settings_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the settings file to read (default: $SOLLOLD_CONFIG, else the first that exists)",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set one setting, such as http.port=8080 (may be repeated)",
    )


def _serving_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    run = command("run", "run the daemon in the foreground", asks=False)
    run.add_argument("--port", metavar="N", help="http.port")
    run.add_argument("--peer-port", metavar="N", help="cluster.port")
    run.add_argument("--host", metavar="ADDRESS", help="http.host and cluster.host")
    run.add_argument("--name", help="node.name")
    run.add_argument("--memory-limit", metavar="SIZE", help="node.memory_limit, such as 20GiB")
    run.add_argument(
        "--models", metavar="FOLDER", action="append", default=[], help="a folder with GGUF files"
    )
    run.add_argument("--seed", metavar="HOST:PORT", action="append", default=[], help="a node to join")
    run.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="log.level")
    run.add_argument(
        "--demo-model", action="store_true", help="with no model on this machine, write a small one to try"
    )
    setup = command("setup", "find llama.cpp, or build it", asks=False)
    setup.add_argument(
        "--portable", action="store_true", help="build for any processor of this kind, to be packed"
    )
    setup.add_argument(
        "--print-folder", action="store_true", help="print where the binaries are, and nothing else"
    )
    config = command("config", "print the settings in force and where each comes from", asks=False)
    config.add_argument(
        "--example", action="store_true", help="print the commented settings file with all defaults"
    )
    config.add_argument("--json", action="store_true", help="print JSON for programs")
    token = command("token", "make a secret for the cluster, so that only your machines can join", asks=False)
    token.add_argument("--show", action="store_true", help="print the token that is in force")
    demo = command("demo", "run three daemons on this machine and spread one model over them", asks=False)
    demo.add_argument("--keep", action="store_true", help="leave them running until Ctrl-C")
    text = "print a completion script for a shell, or the man page"
    completion = command("completion", text, asks=False, settings=False)
    completion.add_argument("shell", choices=["bash", "zsh", "man"], help="what to print")


def _asking_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    status = command("status", "show the cluster: nodes, memory, models that run")
    status.add_argument("--watch", action="store_true", help="show it again every second")
    command("ps", "show the models that run")
    command("models", "show the models of all nodes")
    plan = command(
        "plan",
        "show what would go where, without doing it",
        more="When it can't fit, this says what is missing and the cheapest ways out.",
    )
    route = command("route", "explain who would answer for a model now, and why")
    load = command("load", "load a model and wait until it can answer")
    unload = command("unload", "unload a model")
    chat = command("chat", "talk with a model")
    pull = command("pull", "fetch a model: from another node, Ollama's library or hf.co/…")
    copy = command("copy", "give a model a second name; its files are linked, not copied")
    delete = command("delete", "remove a model that was pulled, or a second name; never your own files")
    for sub in (plan, route, load, unload, chat, pull, copy, delete):
        sub.add_argument("model", metavar="MODEL", help="its name, as `sollold models` shows it")
    copy.add_argument("name", metavar="NAME", help="the second name")
    for sub in (copy, delete):
        sub.add_argument(
            "--on",
            metavar="NODE",
            action="append",
            default=[],
            help="only on this node, by name or id (may be repeated; default: all that have it)",
        )
    for sub in (plan, load):
        sub.add_argument("--context", type=int, default=0, metavar="TOKENS", help="context of each request")
        sub.add_argument("--slots", type=int, default=0, metavar="N", help="requests at a time")
        sub.add_argument("--kv", default="", metavar="TYPE", help="type of the KV cache: f16, q8_0, q4_0 …")
        sub.add_argument(
            "--policy",
            default="",
            choices=["", "fastest", "memory_aware", "even", "spread"],
            help="how to place",
        )
        sub.add_argument(
            "--layers",
            type=_layers,
            default={},
            metavar="NODE=COUNT,…",
            help="layers of each node, in order; the output counts as one",
        )
    load.add_argument(
        "--keep-alive",
        type=_seconds,
        metavar="TIME",
        help="idle time before it is unloaded, such as 90, 5m or 1h30m; -1: never",
    )
    unload.add_argument("--force", action="store_true", help="also while requests are in it")
    chat.add_argument("prompt", nargs="*", help="ask once; without it, a conversation")
    chat.add_argument("--system", default="", help="system prompt")
    chat.add_argument("--think", action="store_true", help="show what a thinking model thinks")
    drain = command("drain", "take this node out of new work and wait until it is empty, to stop it")
    drain.add_argument("--undo", action="store_true", help="take work again")
    drain.add_argument("name", nargs="?", default="", metavar="NODE", help="another node, by name or id")
    command("scan", "look for llama.cpp workers that others started on this LAN")
    command("doctor", "say what is wrong and the one command that mends it")


def _seconds(text: str) -> float:
    """``5m`` as seconds."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _layers(text: str) -> dict[str, int]:
    """``a=8,b=9`` as counts by node."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        node, _, count = part.strip().partition("=")
        if not node or not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not NODE=COUNT")
        counts[node] = int(count)
    return counts
