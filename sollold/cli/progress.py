"""What is shown while something takes long: a model being loaded, a node being emptied."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from sollold.cli.asking import console
from sollold.cli.streams import harmless
from sollold.client.http import Client, ClientError

_LOOK = 0.5
_NEWS = 10
"""Looks that the news of a drain may take."""


@contextlib.asynccontextmanager
async def loading(daemon: Client, model: str) -> AsyncIterator[None]:
    """A bar on the terminal (standard error) with the load of ``model``, within the block."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(model, total=None)

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.5)
                with contextlib.suppress(ClientError):
                    for found in (await daemon.get("/api/cluster"))["deployments"]:
                        if found["model"].split(":")[0] == model.split(":")[0]:
                            words = f"{model}: {found['state']} on {found['node_name']}"
                            bar.update(task, description=words, total=1.0, completed=found["progress"])

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher


async def emptied(daemon: Client, name: str) -> bool:
    """Wait until the draining node (name or id) is empty, saying what it still does; False: it won't be."""
    told = ""
    # It may be another node than the one asked, where the news comes a moment later.
    unheard = _NEWS
    while True:
        state = await daemon.get("/api/cluster")
        node = next((one for one in state["nodes"] if name in (one["name"], one["node"])), None)
        if node is not None and node["draining"]:
            unheard = 0
        elif not unheard:
            return False
        else:
            unheard -= 1
            await asyncio.sleep(_LOOK)
            continue
        if node["empty"]:
            return True
        words = _under_way(state, node["node"])
        if words != told:
            print(harmless(words), file=sys.stderr)
            told = words
        await asyncio.sleep(_LOOK)


def _under_way(state: dict[str, Any], node: str) -> str:
    """What a node that drains still does."""
    here = [found for found in state["deployments"] if found["node"] == node]
    requests = sum(found["active"] + found["waiting"] for found in here)
    lent = [
        found
        for found in state["deployments"]
        if found["node"] != node and any(placed["node"] == node for placed in found["placed"])
    ]
    words = f"draining: {requests} requests under way"
    if lent:
        words += f", layers of {', '.join(sorted({found['model'] for found in lent}))} in use by other nodes"
    return words
