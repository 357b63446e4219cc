"""What is shown while something takes long: a model being loaded, llama.cpp being built."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from sollold.client.http import Client, ClientError


@contextlib.asynccontextmanager
async def loading(daemon: Client, model: str) -> AsyncIterator[None]:
    """A bar on the terminal (standard error) with the load of ``model``, within the block."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
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
