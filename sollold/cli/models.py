"""``sollold models``, ``copy``, ``delete`` and ``push``: list, name, remove and publish models."""

from __future__ import annotations

import argparse
import datetime
import sys
from typing import Any

from sollold.cli.asking import client, print_json, print_result
from sollold.cli.exit import Exit
from sollold.cli.pull import print_steps
from sollold.cli.streams import harmless
from sollold.cli.table import print_table
from sollold.client.blocking import BlockingClient
from sollold.natural_order import natural
from sollold.units import bytes_text

_ALL = "/api/tags?unusable=true"
_SPANS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"))


def models(options: argparse.Namespace) -> int:
    """List all models of the cluster, each once."""
    daemon = client(options)
    found = daemon.get(_ALL if options.all else "/api/tags")["models"]
    if options.json:
        print_json(found)
        return Exit.DONE
    found.sort(key=lambda model: natural(model["name"]))
    if options.quiet:
        for model in found:
            print(harmless(model["name"]))
        return Exit.DONE
    if not found:
        unusable = [] if options.all else daemon.get(_ALL)["models"]
        if unusable:
            number = "the only model" if len(unusable) == 1 else f"any of {len(unusable)} models"
            print(f"can't use {number}: `sollold models --all` says why")
        else:
            print("no models yet: put GGUF files into a folder named in [models] folders, or pull one")
        return Exit.DONE
    titles = ("model", "id", "size", "parameters", "quantization", "modified", "nodes", "not usable")
    print_table(
        titles,
        map(_row, found),
        right=("size", "parameters"),
        whole=("model", "id", "quantization", "modified", "not usable"),
        spare=("id", "quantization", "parameters", "modified", "nodes"),
    )
    return Exit.DONE


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    details = model.get("details", {})
    return (
        model["name"],
        model.get("digest", "")[:12],
        bytes_text(model["size"]),
        size if (size := details.get("parameter_size", "")) != "0" else "",
        details.get("quantization_level", ""),
        _ago(model.get("modified_at", "")),
        ", ".join(model.get("nodes", [])),
        model.get("unusable", ""),
    )


def _ago(moment: str) -> str:
    """An RFC 3339 time relative to now: ``3 days ago``."""
    try:
        date = datetime.datetime.fromisoformat(moment.replace("Z", "+00:00"))
    except ValueError:
        return ""
    if date.year <= 1970:
        # How releases of all ages report a file without a time.
        return ""
    seconds = (datetime.datetime.now(datetime.UTC) - date).total_seconds()
    for length, unit in _SPANS:
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def copy(options: argparse.Namespace) -> int:
    """Give a model a second name."""
    body = {"source": options.model, "destination": options.name, "nodes": options.on}
    client(options, timeout=120).post("/api/copy", body)
    done = {"source": options.model, "destination": options.name}
    return print_result(options, done, f"copied {options.model} to {options.name}")


def delete(options: argparse.Namespace) -> int:
    """Remove a fetched model, or a second name."""
    daemon = client(options, timeout=120)
    holders = _nodes_with(daemon, options.model)
    daemon.delete("/api/delete", {"model": options.model, "nodes": options.on})
    remaining = _nodes_with(daemon, options.model)
    removed = [node for node in holders if node not in remaining]
    lines = [f"deleted {options.model}"]
    if remaining:
        # Models of the same name remain: the user's own files, or those on nodes that --on did not name.
        lines = [f"{lines[0]} from {', '.join(removed) or 'no node'}", f"it stays on {', '.join(remaining)}"]
    return print_result(options, {"deleted": options.model, "from": removed, "left": remaining}, *lines)


def _nodes_with(daemon: BlockingClient, model: str) -> list[str]:
    """Names of the nodes that have a model."""
    found = daemon.get("/api/tags?unusable=true")["models"]
    names = {model.lower(), f"{model.lower()}:latest"}
    return [node for m in found if m["name"].lower() in names for node in m.get("nodes", [])]


def push(options: argparse.Namespace) -> int:
    """Have an Ollama of the cluster push a model; what its library requires is printed."""
    steps = client(options).stream("/api/push", {"model": options.model})
    if options.json:
        for step in steps:
            print_json(step, line=True)
    else:
        print_steps(steps, sys.stdout)
    return Exit.DONE
