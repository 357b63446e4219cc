"""How long the loop of a test works at a stretch, whatever else the machine does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator

import psutil


class Loop:
    """How long the loop's thread worked at most without a pause, in seconds of processor time."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.most_memory = 0

    async def watch(self) -> None:
        process = psutil.Process()
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest, before = max(self.longest, now - before), now
            self.most_memory = max(self.most_memory, process.memory_info().rss)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Loop]:
    loop = Loop()
    # What the tests themselves have in memory is not looked through meanwhile; a daemon does the same.
    gc.collect()
    gc.freeze()
    task = asyncio.create_task(loop.watch())
    try:
        yield loop
    finally:
        task.cancel()
        gc.unfreeze()
