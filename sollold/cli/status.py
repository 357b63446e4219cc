"""``sollold status`` and ``sollold ps``: the cluster as tables."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR = 24


async def status(options: argparse.Namespace) -> int:
    """Nodes with their memory, and what runs."""
    async with client(options) as daemon:
        state = await daemon.get("/api/cluster")
        out = console()
        if options.watch and out.is_terminal and not options.json:
            from rich.live import Live

            with Live(_all(state), console=out, auto_refresh=False) as screen:
                while True:
                    await asyncio.sleep(1)
                    screen.update(_all(await daemon.get("/api/cluster")), refresh=True)
        while True:
            if options.json:
                print_json(state)
            else:
                out.print(_all(state))
            if not options.watch:
                return Exit.DONE
            sys.stdout.flush()
            await asyncio.sleep(1)
            state = await daemon.get("/api/cluster")


async def ps(options: argparse.Namespace) -> int:
    """What runs, and with ``--json`` as ``/api/cluster`` has it."""
    async with client(options) as daemon:
        state = await daemon.get("/api/cluster")
    if options.json:
        print_json(state["deployments"])
    elif state["deployments"]:
        console().print(deployment_table(state))
    else:
        print("nothing is loaded; the first request for a model loads it, or `sollold load MODEL`")
    return Exit.DONE


def _all(state: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(_headline(state)), Text(), node_table(state)]
    if state["deployments"]:
        parts += [Text(), deployment_table(state)]
    parts += [Text(f"\n{words}", style="yellow") for words in _of_plain_workers(state)]
    if state["open"]:
        words = "\nAn open cluster: whoever is on this LAN can join it. `sollold token` makes a secret."
        parts.append(Text(words, style="yellow"))
    return Group(*parts)


def _of_plain_workers(state: dict[str, Any]) -> list[str]:
    """Sentences on workers that others started."""
    found = [(node["name"], worker) for node in state["nodes"] for worker in node.get("plain_workers", [])]
    sentences = [
        f"{name} does not use the worker {worker['address']}: {worker['reason']}"
        for name, worker in found
        if worker["reason"]
    ]
    if any(worker["state"] in ("usable", "taken") for _, worker in found):
        sentences.append("(plain): a worker that others started, neither proved nor encrypted.")
    return sentences


def _headline(state: dict[str, Any]) -> str:
    count = len(state["nodes"])
    leader = state.get("leader_name") or state.get("leader") or "none yet"
    return f"{count} node{'s' if count != 1 else ''}, leader {leader} (term {state['term']})"


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        right = title in ("memory", "free", "context", "speed", "bytes", "requests")
        whole = title in ("node", "address", "layers", "free", "memory", "bytes")
        table.add_column(title, justify="right" if right else "left", no_wrap=whole, overflow="fold")
    return table


def node_table(state: dict[str, Any]) -> Table:
    """A row a device: what is granted of what may be, as a bar."""
    from rich.text import Text

    from sollold.cli.bar import Bar

    table = _table("node", "address", "device", "granted", "free", "memory", "llama.cpp")
    for node in state["nodes"]:
        name = node["name"] + (" (draining)" if node.get("draining") else "")
        if node["node"] == state.get("leader"):
            name += " *"
        address = f"{(node['addresses'] or ['?'])[0]}:{node['http_port']}"
        build = node["build"] or node["setup"] or "none"
        for device in node["devices"] or [None]:
            if device is None:
                table.add_row(name, address, "none", "", "", "", build)
                continue
            limit = max(min(device["limit"], device["total"]), 1)
            bar = Bar([(min(device["granted"] / limit, 1.0), "█", "cyan")], BAR, "·")
            label = device["id"] if device["id"] == "CPU" else f"{device['id']} {device['name']}"
            if device.get("kind") == "plain":
                label = f"{device['id']} (plain)"
            memory = bytes_text(limit)
            table.add_row(name, address, label, bar, bytes_text(device["available"]), memory, build)
            name = address = build = ""
        for worker in node.get("plain_workers", []):
            if worker["state"] not in ("usable", "taken"):
                found = Text(worker["state"], style="yellow")
                table.add_row("", "", f"{worker['address']} (plain)", found, "", "", "")
    return table


def deployment_table(state: dict[str, Any]) -> Table:
    """A row a device that holds layers of a model."""
    names = {node["node"]: node["name"] for node in state["nodes"]}
    table = _table("model", "state", "where", "layers", "bytes", "context", "requests", "speed", "until")
    for found in state["deployments"]:
        condition = found["state"]
        if condition in ("loading", "starting"):
            condition += f" {found['progress']:.0%}"
        requests = f"{found['active']}+{found['waiting']}" if found["waiting"] else str(found["active"])
        speed = f"{found['speed']:.1f}/s" if found["speed"] else ""
        first = [found["model"], condition]
        rest = [str(found["context"] or ""), requests, speed, _until(found)]
        for placed in found["placed"] or [None]:
            if placed is None:
                where, layers, size = names.get(found["node"], found["node"]), "", bytes_text(found["bytes"])
            else:
                where = f"{names.get(placed['node'], placed['node'])} {placed['device']}"
                layers, size = layers_text(placed, found["layers"]), bytes_text(placed["bytes"])
            table.add_row(*first, where, layers, size, *rest)
            first, rest = ["", ""], ["", "", "", ""]
        if found["reason"]:
            table.add_row("", "", found["reason"], style="red")
    return table


def layers_text(placed: dict[str, Any], count: int) -> str:
    """``0-11`` with the output named, since it is no layer to people."""
    first, last = placed["first"], min(placed["last"], count)
    words = [] if last <= first else [str(first) if last == first + 1 else f"{first}-{last - 1}"]
    if placed["last"] > count:
        words.append("output")
    return " + ".join(words) or "embedding"


def _until(found: dict[str, Any]) -> str:
    if found["pinned"] or found["expires"] < 0:
        return "for ever"
    return seconds_text(found["expires"]) if found["expires"] else ""
