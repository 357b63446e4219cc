"""``sollold nodes`` and ``version``: the cluster's machines and their versions."""

from __future__ import annotations

import argparse
import time
from typing import Any

from sollold import __version__
from sollold.cli.asking import client, console, named, print_json
from sollold.cli.exit import Exit
from sollold.cli.own_version import own_commit, own_version
from sollold.cli.streams import harmless
from sollold.cli.table import columns, print_table
from sollold.client.errors import ClientError, NodeSilent
from sollold.units import bytes_text

_SPARE = ("llama.cpp", "release", "devices", "memory", "address")


def nodes(options: argparse.Namespace) -> int:
    """Print one row per machine."""
    state = client(options).get("/api/cluster")
    missing = state.get("offline", [])
    listed = missing if options.offline else state["nodes"]
    if options.waiting:
        listed = [{**machine, "at": names} for machine, names in _waiting(state)]
    if options.json:
        print_json(listed)
        return Exit.DONE
    if options.quiet:
        for node in listed:
            print(harmless(node["name"]))
        return Exit.DONE
    if options.waiting and not listed:
        print("no machine waits for admission")
        return Exit.DONE
    if options.offline and not listed:
        print("no node is offline")
        return Exit.DONE
    if options.waiting:
        rows = [(m["name"], m["node"], m["code"], ", ".join(m["at"])) for m in listed]
        waiting_titles = ("machine", "id", "code", "waits at")
        print_table(waiting_titles, rows, whole=waiting_titles)
        return Exit.DONE
    titles = ("node", "address", "state", "memory", "free", "devices", "release", "llama.cpp")
    present = [] if options.offline else state["nodes"]
    print_table(
        titles,
        [*map(_row, present), *map(_missing_row, missing)],
        right=("memory", "free"),
        whole=("node", "address"),
        spare=_SPARE,
    )
    return Exit.DONE


def _waiting(state: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """Machines waiting for admission, and the names of the nodes they asked."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for node in state["nodes"]:
        for machine in node.get("waiting", []):
            found.setdefault(machine["node"], (machine, []))[1].append(node["name"])
    return list(found.values())


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    return (
        node["name"] + (" *" if node["leader"] else ""),
        f"{(node['addresses'] or ['?'])[0]}:{node['http_port']}",
        _state(node),
        bytes_text(node["total"]),
        bytes_text(node["available"]),
        ", ".join(device["id"] for device in node["devices"]) or "none",
        node["release"],
        node["build"] or node["setup"] or "none",
    )


def _missing_row(node: dict[str, Any]) -> tuple[str, ...]:
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(node["since"]))
    state = f"{'stopped' if node['stopped'] else 'offline'} since {since}"
    return node["name"], node["url"].partition("://")[2], state, bytes_text(node["total"]), "", "", "", ""


def _state(node: dict[str, Any]) -> str:
    if node["draining"]:
        return "drained" if node["empty"] else "draining"
    return "ready"


def version(options: argparse.Namespace) -> int:
    """Print the versions of this program and of all nodes, with a warning if they differ."""
    try:
        found = client(options, timeout=5.0).get("/api/cluster")["nodes"]
    except ClientError as error:
        # Its own version is known, also while the daemon hangs.
        if options.node or (error.status and not isinstance(error, NodeSilent)):
            raise
        found = []
    if options.json:
        print_json(
            {
                "version": __version__,
                "commit": own_commit(),
                "nodes": [
                    {"name": node["name"], "release": node["release"], "build": node["build"]}
                    for node in found
                ],
            }
        )
        return Exit.DONE
    out = console()
    out.print(f"sollold {own_version()}")
    if not found:
        target = named(options)
        out.print(f"no daemon answers {f'at {target}' if target else 'on this machine'}", style="dim")
        return Exit.DONE
    width = max(columns(node["name"]) for node in found)
    for node in found:
        name = node["name"] + " " * (width - columns(node["name"]))
        out.print(f"{name}  sollold {node['release']}, llama.cpp {node['build'] or 'none'}")
    for words in differences(found):
        out.print(words, style="yellow")
    return Exit.DONE


def differences(found: list[dict[str, Any]]) -> list[str]:
    """Sentences on versions that differ between nodes; empty if all are the same."""
    sentences = []
    if len({node["release"] for node in found}) > 1:
        sentences.append("Warning: the nodes run different releases of sollold; upgrade all of them.")
    if len({node["build"] for node in found if node["build"]}) > 1:
        sentences.append(
            "Warning: the nodes have different builds of llama.cpp; a model runs on nodes of one build."
        )
    return sentences
