"""``sollold load``, ``unload``, ``drain`` and ``forget``: manual control of what runs where."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from sollold.cli.asking import client, print_json, print_result
from sollold.cli.exit import Exit
from sollold.cli.progress import emptied, loading
from sollold.cli.streams import harmless
from sollold.units import bytes_text


def wishes(options: argparse.Namespace) -> dict[str, Any]:
    """The body of requests to ``/api/cluster/load`` and ``/plan``."""
    body: dict[str, Any] = {"model": options.model, "context": options.context}
    if options.slots is not None:
        body["slots"] = options.slots
    if options.kv:
        body |= {"type_k": options.kv, "type_v": options.kv}
    if options.policy:
        body["policy"] = options.policy
    if options.speculation:
        body["speculation"] = options.speculation
    if options.layers:
        body["layers"] = options.layers
    if getattr(options, "online", False):
        body["online"] = True
    if (keep := getattr(options, "keep_alive", None)) is not None:
        body["keep_alive"] = keep
    return body


def load(options: argparse.Namespace) -> int:
    """Load a model, with a progress bar, and print where it was placed."""
    daemon = client(options)
    with loading(daemon, options.model):
        answer = daemon.post("/api/cluster/load", wishes(options), timeout=3600)
    if options.json:
        print_json(answer)
        return Exit.DONE
    state = daemon.get("/api/cluster")
    for found in state["deployments"]:
        if found["id"] == answer.get("deployment"):
            nodes = sorted({placed["node_name"] for placed in found["placed"]})
            words = f"on {', '.join(nodes)}, {bytes_text(found['bytes'])}, context {found['context']}"
            print(harmless(f"{found['model']} is loaded {words}"))
            break
    else:
        print(f"{options.model} is loaded")
    for warning in answer.get("warnings", ()):
        print(harmless(f"warning: {warning}"))
    return Exit.DONE


def unload(options: argparse.Namespace) -> int:
    """Unload a model on all nodes."""
    daemon = client(options)
    answer = daemon.post("/api/cluster/unload", {"model": options.model, "force": options.force})
    return print_result(options, answer, f"{options.model}{_unload_text(answer)}")


def _unload_text(answer: dict[str, Any]) -> str:
    """The result of an unload, to be printed after the model's name."""
    count: int = answer["unloaded"]
    if answer.get("cancelled"):
        return f": load cancelled, {count} unloaded" if count else ": load cancelled"
    if answer.get("forgotten"):
        outcome = f": {count} unloaded" if count else " was lost"
        return f"{outcome}; it is not loaded again"
    return f": {count} unloaded" if count else " was not loaded"


def drain(options: argparse.Namespace) -> int:
    """Stop sending work to a node and wait until it is empty, or undo that."""
    daemon = client(options)
    answer = daemon.post("/api/cluster/drain", {"node": options.name, "on": not options.undo})
    empty = not options.undo and emptied(daemon, answer["node"])
    if options.undo:
        text = "accepts requests again"
    elif empty:
        text = f"is drained; safe to stop (back with `sollold undrain {shlex.quote(answer['node'])}`)"
    else:
        text = "is not drained: it left the cluster or was undrained"
    print_result(options, answer | {"empty": empty}, f"{answer['node']} {text}")
    return Exit.DONE if empty or options.undo else Exit.FAILED


def undrain(options: argparse.Namespace) -> int:
    """Let a node accept work again."""
    return drain(argparse.Namespace(**{**vars(options), "undo": True}))


def forget(options: argparse.Namespace) -> int:
    """Remove a node from the list of offline nodes."""
    answer = client(options).post("/api/cluster/forget", {"node": options.name})
    return print_result(options, answer, f"{options.name} is removed from the list of offline nodes")
