"""Measure how long a test blocks its event loop, independent of other load on the machine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator

import psutil


class Loop:
    """Maxima since the start: CPU seconds of the thread between two turns of the loop, and resident bytes."""

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
    # Exclude existing objects from garbage collection, as the daemon does.
    gc.collect()
    gc.freeze()
    task = asyncio.create_task(loop.watch())
    try:
        yield loop
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        gc.unfreeze()
