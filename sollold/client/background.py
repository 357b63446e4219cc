"""An event loop in a thread of its own, for callers that block. One for the process, started when needed."""

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
    """The loop. A forked child gets one of its own."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="sollold client", daemon=True).start()
        return _loop


def _forked() -> None:
    """In a forked child: another thread may have held the lock at that moment."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` there and wait for its result. Ctrl-C cancels it.

    Raises:
        RuntimeError: it is called on that very loop, which it would block for ever.
    """
    if sys.is_finalizing():
        # The thread of the loop stands still already.
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
    """The items of an async generator, each made on the loop when it is asked for."""
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
