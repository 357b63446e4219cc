"""The commands and their options, group by group, without importing any command's module."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sollold.units import parse_seconds

NODE = "the node to ask: its name, address or URL (default: $SOLLOLD_NODE_URL, else this machine)"
JSON = "print JSON for programs"

CLUSTER_ACTIONS = """actions:
  members  show the members and who let them in; those that are away or were evicted too
  open     admit any machine on this LAN that comes within 10 minutes, or the TIME given
  close    end that
  rotate   give all members a new secret; nothing restarts and no answer is interrupted
  evict    exclude a member at once: its key is refused until `sollold admit`
  secure   give an open cluster a secret, known only to its current nodes
  ca       print the authority to trust where nodes have certificates of the cluster (http.tls)"""

Command = Callable[..., argparse.ArgumentParser]
"""Adds one command: its name, its help line, ``asks`` (whether it queries a node) and ``settings``."""


def add_commands(command: Command) -> None:
    """Add all commands, in the order in which help lists them."""
    _serving_commands(command)
    _installing_commands(command)
    _cluster_commands(command)
    _access_commands(command)
    _upkeep_commands(command)
    _model_commands(command)
    _watching_commands(command)


def _serving_commands(command: Command) -> None:
    run = command(
        "run",
        "run a model (as chat does), downloaded first if no node has it; "
        "without MODEL, or as serve: run the daemon in the foreground",
        asks=False,
    )
    run.add_argument("model", metavar="MODEL", nargs="?", default="", help="the model to talk with")
    _chat_options(run)
    run.add_argument("--node", metavar="NODE", default=argparse.SUPPRESS, help=NODE)
    run.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON)
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
        "--demo-model", action="store_true", help="create a small demo model if this machine has no model"
    )


def _installing_commands(command: Command) -> None:
    setup = command("setup", "find llama.cpp, or build it", asks=False)
    setup.add_argument(
        "--portable",
        action="store_true",
        help="build for every processor of this architecture (for packaging)",
    )
    setup.add_argument(
        "--gpu",
        choices=["cuda", "hip", "vulkan"],
        default="",
        help="with --portable: build for these GPUs as well, with the toolkit that is installed here",
    )
    setup.add_argument(
        "--architectures",
        metavar="LIST",
        default="",
        help="of those GPUs, as CMake lists them: 86;89 or gfx1030;gfx1100 (default: all the usual ones)",
    )
    setup.add_argument("--print-folder", action="store_true", help="print only the path of the binaries")
    config = command("config", "print the settings in effect and where each comes from", asks=False)
    config.add_argument(
        "--example", action="store_true", help="print the commented settings file with all defaults"
    )
    config.add_argument("--check", action="store_true", help="check the settings, and print only errors")
    config.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON)
    token = command("token", "create a cluster secret, so that only your machines can join", asks=False)
    token.add_argument("--show", action="store_true", help="print the cluster.token in use")
    demo = command("demo", "run three daemons on this machine with one model spread over them", asks=False)
    demo.add_argument("--keep", action="store_true", help="keep them running until Ctrl-C")
    install = command(
        "install", "install a service of this user (for pipx, uv or pip)", asks=False, settings=False
    )
    install.add_argument("--user", action="store_true", required=True, help="as a user service of systemd")
    install.add_argument("--now", action="store_true", help="also enable and start it")
    install.add_argument("--remove", action="store_true", help="stop the service and remove its unit")
    text = "print a completion script for a shell, or the man page"
    completion = command("completion", text, asks=False, settings=False)
    completion.add_argument("shell", choices=["bash", "zsh", "fish", "man"], help="what to print")


def _model_commands(command: Command) -> None:
    models = command("models", "list the models of all nodes")
    models.add_argument("-q", "--quiet", action="store_true", help="print only names")
    models.add_argument(
        "-a", "--all", action="store_true", help="also show files that can't be used, and why"
    )
    plan = command(
        "plan",
        "show where a model would be placed, without loading it",
        more="If it does not fit, says what is missing and the cheapest remedies. A model that no node has\n"
        "is planned from its file's header: hf.co/ORG/REPO:QUANT, and with --online Ollama's names too.",
    )
    plan.add_argument(
        "--online", action="store_true", help="if no node has the model, read its header in Ollama's registry"
    )
    route = command("route", "explain which endpoint would serve a model now, and why")
    load = command("load", "load a model and wait until it is ready")
    unload = command("unload", "unload a model")
    chat = command("chat", "chat with a model")
    pull = command("pull", "download or update a model: from another node, Ollama's library or hf.co/…")
    copy = command("copy", "give a model another name (its files are linked, not copied)")
    delete = command("delete", "delete a pulled model or an added name; never your own files")
    push = command("push", "push a model to Ollama's library (needs an Ollama that has it)")
    show = command("show", "show details of a model")
    for part in ("license", "modelfile", "parameters", "system", "template"):
        show.add_argument(
            f"--{part}",
            dest="part",
            action="store_const",
            const=part,
            default="",
            help=f"print only its {part}",
        )
    for sub in (plan, route, load, unload, chat, pull, push, copy, delete, show):
        sub.add_argument("model", metavar="MODEL", help="model name as shown by `sollold models`")
    copy.add_argument("name", metavar="NAME", help="new name")
    for sub in (copy, delete):
        sub.add_argument(
            "--on",
            metavar="NODE",
            action="append",
            default=[],
            help="only on this node, by name or id (repeatable; default: all that have it)",
        )
    for sub in (plan, load):
        _placement_options(sub)
    load.add_argument(
        "--keep-alive",
        type=_seconds,
        metavar="TIME",
        help="unload after this idle time, such as 90, 5m or 1h30m; -1: never",
    )
    unload.add_argument(
        "--force",
        action="store_true",
        help="even while requests are running or wait for its load: they end with an error",
    )
    _chat_options(chat)


def _placement_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--context", type=_count, default=0, metavar="TOKENS", help="context length per request, in tokens"
    )
    sub.add_argument("--slots", type=_count, metavar="N", help="parallel requests, 1 or more")
    sub.add_argument("--kv", default="", metavar="TYPE", help="KV cache type: f16, q8_0, q4_0 …")
    sub.add_argument(
        "--policy",
        type=str.lower,
        default="",
        choices=["fastest", "memory_aware", "even", "spread"],
        metavar="POLICY",
        help="how layers are placed: fastest, memory_aware, even or spread",
    )
    sub.add_argument(
        "--speculation",
        default="",
        metavar="HOW",
        help="how tokens are drafted: auto, off, mtp, ngram or the name of a draft model",
    )
    sub.add_argument(
        "--layers",
        type=_layers,
        default={},
        metavar="NODE=COUNT,…",
        help="layers per node, in order; the output layer counts as one",
    )


def _chat_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "prompt", metavar="PROMPT", nargs="*", default=[], help="ask once; without it, start a conversation"
    )
    sub.add_argument("--system", default="", help="system prompt")
    sub.add_argument("--think", action="store_true", help="show the thinking of a reasoning model")


def _cluster_commands(command: Command) -> None:
    status = command("status", "show the cluster: nodes, memory, running models")
    status.add_argument("--watch", action="store_true", help="refresh every second")
    ps = command("ps", "show running models")
    ps.add_argument("-q", "--quiet", action="store_true", help="print only names")
    drain = command("drain", "stop accepting requests on a node and wait for running ones")
    drain.add_argument("--undo", action="store_true", help="accept requests again")
    drain.add_argument("name", nargs="?", default="", metavar="NODE", help="another node, by name or id")
    undrain = command("undrain", "accept requests on a node again after drain")
    undrain.add_argument("name", nargs="?", default="", metavar="NODE", help="another node, by name or id")


def _access_commands(command: Command) -> None:
    admit = command("admit", "admit a waiting machine to the cluster")
    admit.add_argument("name", metavar="NAME", help="its name, id or code, as `sollold status` shows it")
    cluster = command(
        "cluster",
        "show the members, admit new machines for a while, or change the cluster's secret",
        more=CLUSTER_ACTIONS,
    )
    actions = ["members", "open", "close", "rotate", "evict", "secure", "ca"]
    cluster.add_argument("action", choices=actions, help="what to show or do")
    cluster.add_argument(
        "argument",
        nargs="?",
        default="",
        metavar="NODE",
        help="with evict: the name or id of the member; with open: how long (default: 10m)",
    )
    cluster.add_argument(
        "--without",
        metavar="NODE",
        action="append",
        default=[],
        help="with secure: leave this node out (repeatable)",
    )
    cluster.add_argument("--yes", action="store_true", help="with secure: do not ask")
    command(
        "invite",
        "print a code with which one machine may join the cluster",
        more="For machines that this one's multicast does not reach. The code is good for ten minutes, three "
        "tries and one\nmachine, and only at the node that printed it.",
    )
    join = command("join", "join a cluster by the code that `sollold invite` printed there")
    join.add_argument("code", metavar="CODE", help="the code, eight digits")
    join.add_argument(
        "--seed",
        metavar="HOST[:PORT]",
        required=True,
        help="the machine that printed it (default port: 11436)",
    )
    key = command("key", "create, list and revoke API keys")
    key.add_argument("verb", choices=["new", "list", "revoke"], help="what to do")
    key.add_argument("name", metavar="NAME", nargs="?", default="", help="the key's name")
    key.add_argument(
        "--scope",
        choices=["infer", "models", "admin"],
        default="infer",
        help="what a new key may do: use models, also manage models, or everything (default: infer)",
    )
    key.add_argument(
        "-q", "--quiet", action="store_true", help="with list: print the names of keys that are not revoked"
    )
    key.add_argument("--expires", metavar="TIME", help="end of a new key, such as 12h or 30d")


def _upkeep_commands(command: Command) -> None:
    forget = command("forget", "remove a node that is gone for good from the list of offline nodes")
    forget.add_argument("name", metavar="NODE", help="its name or id")
    command("scan", "find llama.cpp RPC workers started by others on this LAN")
    command("doctor", "find problems and how to fix them")


def _watching_commands(command: Command) -> None:
    nodes = command("nodes", "list the nodes with their memory and versions")
    nodes.add_argument("-q", "--quiet", action="store_true", help="print only names")
    group = nodes.add_mutually_exclusive_group()
    group.add_argument("--offline", action="store_true", help="only those that are offline")
    group.add_argument("--waiting", action="store_true", help="machines that wait for `sollold admit`")
    command("version", "show the versions of all nodes")
    command("top", "show nodes, models and requests as they change")
    events = command("events", "show what happened in the cluster: joins, deaths, loads, resumed streams")
    events.add_argument("-f", "--follow", action="store_true", help="keep printing new events until Ctrl-C")
    logs = command("logs", "show the last lines of the daemon's journal, or of a model's engine")
    logs.add_argument("model", metavar="MODEL", nargs="?", default="", help="the model whose engine is meant")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing new lines until Ctrl-C")
    logs.add_argument(
        "-n", "--lines", type=_count, default=50, metavar="N", help="how many lines (default: 50)"
    )
    bench = command("bench", "measure how fast a model reads prompts and writes answers")
    bench.add_argument("model", metavar="MODEL", help="model name as shown by `sollold models`")
    bench.add_argument(
        "--callers",
        type=_counts,
        default=[1, 2, 4],
        metavar="N,…",
        help="requests at a time (default: 1,2,4)",
    )
    bench.add_argument(
        "--prompt-tokens", type=_count, default=512, metavar="N", help="length of each prompt, about"
    )
    bench.add_argument("--tokens", type=_count, default=128, metavar="N", help="length of each answer")
    support = command("support", "write an archive for a bug report, without secrets and prompts")
    support.add_argument("-o", "--output", default="", metavar="FILE", help="where to write it")
    dashboard = command("dashboard", "print the dashboard's address and open it")
    dashboard.add_argument("--print", action="store_true", help="only print it")


def settings_options(sub: argparse.ArgumentParser) -> None:
    """Add the options for the settings file and for single settings."""
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
        help="set one setting, such as http.port=8080 (repeatable)",
    )


def _count(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    """Parse ``1,2,4``."""
    return [_count(part.strip()) for part in text.split(",")]


def _seconds(text: str) -> float:
    """Parse a duration such as ``5m`` into seconds."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _layers(text: str) -> dict[str, int]:
    """Parse ``a=8,b=9`` into layer counts by node."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        node, _, count = part.strip().partition("=")
        if not node or not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not NODE=COUNT")
        counts[node] = int(count)
    return counts
