"""A background event loop for the blocking classes: one thread per process, started on demand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The background loop. A forked child gets its own."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="sollold client", daemon=True).start()
        return _loop


def _forked() -> None:
    """Reset the state in a forked child, where another thread may have held the lock."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` on the background loop and wait for its result. Ctrl-C cancels it.

    Raises:
        RuntimeError: called on the background loop itself, which would block forever.
    """
    if sys.is_finalizing():
        # The loop's thread is blocked already.
        work.close()
        raise RuntimeError("the interpreter ends")
    target = loop()
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is target:
        work.close()
        raise RuntimeError("a blocking call from the client's own event loop; use the async classes there")
    future = asyncio.run_coroutine_threadsafe(work, target)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise RuntimeError("the call was cancelled") from None
    except BaseException:
        future.cancel()
        raise


def iterate(items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Iterate over an async generator, producing each item on the background loop on demand."""
    end = object()

    async def step() -> Any:
        return await anext(items, end)

    async def close() -> None:
        await items.aclose()

    try:
        while (item := run(step())) is not end:
            yield item
    finally:
        with contextlib.suppress(RuntimeError):
            run(close())
