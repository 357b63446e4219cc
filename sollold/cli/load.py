"""``sollold load``, ``unload`` and ``drain``: what runs where, by hand."""

from __future__ import annotations

import argparse
from typing import Any

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit
from sollold.cli.progress import emptied, loading
from sollold.cli.streams import harmless
from sollold.units import bytes_text


def wishes(options: argparse.Namespace) -> dict[str, Any]:
    """The body of ``/api/cluster/load`` and ``/plan``."""
    body: dict[str, Any] = {"model": options.model, "context": options.context, "slots": options.slots}
    if options.kv:
        body |= {"type_k": options.kv, "type_v": options.kv}
    if options.policy:
        body["policy"] = options.policy
    if options.layers:
        body["layers"] = options.layers
    if (keep := getattr(options, "keep_alive", None)) is not None:
        body["keep_alive"] = keep
    return body


async def load(options: argparse.Namespace) -> int:
    """Load, with a bar, and say where it went."""
    async with client(options) as daemon:
        async with loading(daemon, options.model):
            answer = await daemon.post("/api/cluster/load", wishes(options), timeout=3600)
        if options.json:
            print_json(answer)
            return Exit.DONE
        state = await daemon.get("/api/cluster")
    names = {node["node"]: node["name"] for node in state["nodes"]}
    for found in state["deployments"]:
        if found["id"] == answer.get("deployment"):
            where = sorted({names.get(placed["node"], placed["node"]) for placed in found["placed"]})
            words = f"on {', '.join(where)}, {bytes_text(found['bytes'])}, context {found['context']}"
            print(harmless(f"{found['model']} is loaded {words}"))
            return Exit.DONE
    print(f"{options.model} is loaded")
    return Exit.DONE


async def unload(options: argparse.Namespace) -> int:
    """Unload everywhere."""
    async with client(options) as daemon:
        answer = await daemon.post("/api/cluster/unload", {"model": options.model, "force": options.force})
    if options.json:
        print_json(answer)
    else:
        count = answer["unloaded"]
        print(f"{options.model}: {count} unloaded" if count else f"{options.model} was not loaded")
    return Exit.DONE


async def drain(options: argparse.Namespace) -> int:
    """Take a node out of new work and wait until it is empty, or take it back."""
    async with client(options) as daemon:
        answer = await daemon.post("/api/cluster/drain", {"node": options.name, "on": not options.undo})
        empty = not options.undo and await emptied(daemon, answer["node"])
    if options.json:
        print_json(answer | {"empty": empty})
    elif options.undo:
        print(f"{answer['node']} takes work again")
    elif empty:
        print(f"{answer['node']} is empty and takes no new work: it is safe to stop. --undo takes it back")
    else:
        print(f"{answer['node']} is not drained: it left the cluster, or takes work again")
    return Exit.DONE if empty or options.undo else Exit.FAILED
