"""Blocking work in threads of its own: the loop's shared ones are for what is over in a moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NICE = 10


async def in_thread(threads: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``work`` gives. Waits for its end even if the caller goes, unless it has not begun.

    Files that it uses may be closed afterwards.
    """
    job = threads.submit(work, *args, **kwargs)
    waiting = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(waiting)
    finally:
        if not job.cancel():
            await asyncio.gather(waiting, return_exceptions=True)


def behind_others() -> None:
    """Called in a thread that copies or compares much: engines and the loop get the processor first.

    Not for threads that run much Python: whatever waits for the interpreter's lock waits for them, too.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def alone(work: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """What ``work`` gives, from a thread for it alone, which nobody waits for when the daemon ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    # The caller may have gone: then nobody retrieves the error.
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    def end(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, fault = None, None
        try:
            result = work()
        except BaseException as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(end, result, fault)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
