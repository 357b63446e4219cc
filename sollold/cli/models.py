"""``sollold models``, ``pull``, ``copy`` and ``delete``: what there is, getting more, and naming it."""

from __future__ import annotations

import argparse
import sys

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.units import bytes_text


async def models(options: argparse.Namespace) -> int:
    """All models of the cluster, each once."""
    async with client(options) as daemon:
        found = (await daemon.get("/api/tags"))["models"]
    if options.json:
        print_json(found)
        return Exit.DONE
    if not found:
        print("no models yet: put GGUF files into a folder of the settings ([models] folders), or pull one")
        return Exit.DONE
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "size", "parameters", "quantization", "nodes", ""):
        table.add_column(
            title, justify="right" if title in ("size", "parameters") else "left", overflow="fold"
        )
    for item in found:
        details = item.get("details", {})
        table.add_row(
            item["name"],
            bytes_text(item["size"]),
            details.get("parameter_size", ""),
            details.get("quantization_level", ""),
            ", ".join(item.get("nodes", [])),
            item.get("unusable", ""),
        )
    console().print(table)
    return Exit.DONE


async def pull(options: argparse.Namespace) -> int:
    """Fetch a model, with a bar a file."""
    async with client(options) as daemon:
        if options.json or not sys.stdout.isatty():
            last = ""
            async for item in daemon.stream("/api/pull", {"model": options.model}):
                if options.json:
                    print_json(item)
                elif item.get("status") != last:
                    last = item.get("status", "")
                    print(last, flush=True)
            return Exit.DONE
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=console()) as bar:
            tasks = {}
            async for item in daemon.stream("/api/pull", {"model": options.model}):
                digest = item.get("digest", "")
                if not digest:
                    bar.console.print(item.get("status", ""))
                    continue
                if digest not in tasks:
                    tasks[digest] = bar.add_task(item.get("status", digest[:19]), total=item.get("total"))
                bar.update(tasks[digest], completed=item.get("completed", 0), total=item.get("total"))
    return Exit.DONE


async def copy(options: argparse.Namespace) -> int:
    """Give a model a second name."""
    body = {"source": options.model, "destination": options.name, "nodes": options.on}
    async with client(options, timeout=120) as daemon:
        await daemon.post("/api/copy", body)
    if options.json:
        print_json({"source": options.model, "destination": options.name})
    else:
        print(f"{options.model} is also {options.name} now")
    return Exit.DONE


async def delete(options: argparse.Namespace) -> int:
    """Remove a fetched model or a second name."""
    async with client(options, timeout=120) as daemon:
        await daemon.delete("/api/delete", {"model": options.model, "nodes": options.on})
    if options.json:
        print_json({"deleted": options.model})
    else:
        print(f"{options.model} is deleted")
    return Exit.DONE
