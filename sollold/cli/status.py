"""``sollold status`` and ``sollold ps``: the cluster as tables."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.cli.following import Follower
from sollold.cli.on_screen import on_screen
from sollold.cli.streams import harmless
from sollold.machine.device import PROCESSOR
from sollold.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sollold.cli.fitting import Fitting

BAR = 24


def status(options: argparse.Namespace) -> int:
    """Print the nodes with their memory, and the deployments."""
    daemon = client(options)
    follower = Follower()

    def fetch() -> dict[str, Any]:
        found: dict[str, Any] = follower.ask(lambda: daemon.get("/api/cluster"))
        return found

    state = fetch()
    out = console()
    if options.watch and out.is_terminal and not options.json:
        from rich.live import Live

        with on_screen(Live(_all(state), console=out, auto_refresh=False)) as screen:
            while True:
                time.sleep(1)
                screen.update(_all(fetch()), refresh=True)
    while True:
        if options.json:
            print_json(state, line=options.watch)
        else:
            out.print(_all(state))
        if not options.watch:
            return Exit.DONE
        sys.stdout.flush()
        time.sleep(1)
        state = fetch()


def ps(options: argparse.Namespace) -> int:
    """Print the deployments; with ``--json`` as in ``/api/cluster``."""
    state = client(options).get("/api/cluster")
    if options.json:
        print_json(state["deployments"])
    elif options.quiet:
        for model in dict.fromkeys(d["model"] for d in state["deployments"]):
            print(harmless(model))
    elif state["deployments"]:
        out = console()
        out.print(deployment_table(state))
        for words in faults(state):
            out.print(words, style="red")
    else:
        print("nothing is loaded; the first request for a model loads it, or `sollold load MODEL`")
    return Exit.DONE


def _all(state: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(state)), Text(), node_table(state)]
    if state["deployments"]:
        parts += [Text(), deployment_table(state)]
        parts += [Text(words, style="red") for words in faults(state)]
    parts += [Text(f"\n{words}", style="red") for words in _offline(state)]
    parts += [Text(f"\n{words}", style="yellow") for words in _plain_workers(state)]
    if state["open"]:
        words = (
            "\nOpen cluster: anyone on this LAN can join, and then read prompts, write answers and fetch "
            "models. `sollold cluster secure` gives it a secret."
        )
        parts.append(Text(words, style="red"))
    parts += [Text(f"\n{words}", style="yellow") for words in of_admission(state)]
    if state.get("auth") == "open":
        words = "\nOpen API: anyone on this LAN can ask models. `sollold key new NAME` creates a key."
        parts.append(Text(words, style="yellow"))
    return Group(*parts)


def of_admission(state: dict[str, Any]) -> list[str]:
    """Sentences on machines waiting for admission, including this one."""
    sentences = []
    for node in state["nodes"]:
        sentences += [
            f"{m['name']}{', which was evicted,' if m.get('evicted') else ''} waits for admission; "
            # By its code, which is unambiguous whatever the machines are called.
            f"if it shows {m['code']}: sollold admit {shlex.quote(m['code'])}"
            for m in node.get("waiting", [])
        ]
        if node.get("inviting"):
            sentences.append(f"{node['name']} {node['inviting']}.")
        if node.get("me") and node.get("seeking"):
            sentences.append(f"This machine {node['seeking']}.")
    return sentences


def faults(state: dict[str, Any]) -> list[str]:
    """A sentence per model that has a problem, and on which node."""
    sentences = (
        f"{d['model']} on {d['node_name']}: {d['reason']}" for d in state["deployments"] if d["reason"]
    )
    return list(dict.fromkeys(sentences))


def _offline(state: dict[str, Any]) -> list[str]:
    """A sentence per offline node: since when, and what it held."""
    sentences = []
    for node in state.get("offline", []):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(node["since"]))
        held = sum(share["bytes"] for share in node["held"])
        models = ", ".join(sorted({share["model"] for share in node["held"]} | set(node["served"])))
        state_word = "stopped" if node["stopped"] else "offline"
        words = f"{node['name']} is {state_word} since {since}"
        if models:
            words += f"; it held {bytes_text(held)} of {models}" if held else f"; it served {models}"
        sentences.append(words)
    return sentences


def _plain_workers(state: dict[str, Any]) -> list[str]:
    """Sentences on external workers."""
    found = [(node["name"], worker) for node in state["nodes"] for worker in node.get("plain_workers", [])]
    sentences = [
        f"{name} does not use the worker {worker['address']}: {worker['reason']}"
        for name, worker in found
        if worker["reason"]
    ]
    if any(worker["state"] in ("usable", "taken") for _, worker in found):
        sentences.append("(external): a worker started by others, neither authenticated nor encrypted.")
    return sentences


def headline(state: dict[str, Any]) -> str:
    """The number of nodes, and the leader."""
    count = len(state["nodes"])
    leader = state.get("leader_name") or state.get("leader") or "none yet"
    return f"{count} node{'s' if count != 1 else ''}, leader {leader} (term {state['term']})"


_RIGHT = ("memory", "free", "context", "speed", "bytes", "requests")
_WHOLE = ("node", "address", "layers", "free", "memory", "bytes", "where")


def node_table(state: dict[str, Any]) -> Fitting:
    """A table with a row per device; a bar shows the granted share of its memory."""
    from rich.text import Text

    from sollold.cli.bar import Bar
    from sollold.cli.fitting import Fitting

    titles = ("node", "address", "device", "granted", "free", "memory", "llama.cpp")
    table = Fitting(titles, _RIGHT, _WHOLE, spare=("llama.cpp", "granted", "address", "memory"))
    for node in state["nodes"]:
        drain = "drained" if node.get("empty") else "draining"
        name = node["name"] + (f" ({drain})" if node.get("draining") else "")
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
            label = device["id"] if device["id"] == PROCESSOR else f"{device['id']} {device['name']}"
            if device.get("kind") == "plain":
                label = f"{device['id']} (external)"
            memory = bytes_text(limit)
            table.add_row(name, address, label, bar, bytes_text(device["available"]), memory, build)
            name = address = build = ""
        for worker in node.get("plain_workers", []):
            if worker["state"] not in ("usable", "taken"):
                found = Text(worker["state"], style="yellow")
                table.add_row("", "", f"{worker['address']} (external)", found, "", "", "")
    return table


def deployment_table(state: dict[str, Any]) -> Fitting:
    """A table with a row per device that holds layers of a model."""
    from sollold.cli.fitting import Fitting

    titles = ("model", "state", "where", "layers", "bytes", "context", "requests", "speed", "until")
    table = Fitting(
        titles, _RIGHT, _WHOLE, spare=("until", "context", "requests", "bytes", "speed", "layers")
    )
    for found in state["deployments"]:
        condition = found["state"]
        # A failed deployment has freed its memory; it is listed for a while to show the reason.
        size_text = _no_size if condition == "failed" else bytes_text
        if condition in ("loading", "starting"):
            condition += f" {found['progress']:.0%}"
        requests = f"{found['active']}+{found['waiting']}" if found["waiting"] else str(found["active"])
        speed = f"{found['speed']:.1f}/s" if found["speed"] else ""
        if drafts := found.get("speculation"):
            right = f" {drafts['acceptance']:.0%}" if drafts["drafted"] else ""
            speed = f"{speed} ({drafts['by']}{right})".lstrip()
        first = [found["model"], condition]
        rest = [str(found["context"] or ""), requests, speed, _until(found)]
        for placed in found["placed"] or [None]:
            if placed is None:
                location, layers, size = found["node_name"], "", size_text(found["bytes"])
            else:
                location = f"{placed['node_name']} {placed['device']}"
                layers, size = layers_text(placed, found["layers"]), size_text(placed["bytes"])
            table.add_row(*first, location, layers, size, *rest)
            first, rest = ["", ""], ["", "", "", ""]
    return table


def layers_text(placed: dict[str, Any], count: int) -> str:
    """Layer ranges such as ``0-11``; the output layer is named."""
    first, last = placed["first"], min(placed["last"], count)
    words = [] if last <= first else [str(first) if last == first + 1 else f"{first}-{last - 1}"]
    if placed["last"] > count:
        words.append("output")
    return " + ".join(words) or "embedding"


def _no_size(size: int) -> str:
    return ""


def _until(deployment: dict[str, Any]) -> str:
    if deployment["state"] == "failed":
        return ""
    if deployment["pinned"] or deployment["expires"] < 0:
        return "never expires"
    return seconds_text(deployment["expires"]) if deployment["expires"] else ""
