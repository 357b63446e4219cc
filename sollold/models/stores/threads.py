"""Runs blocking work in dedicated threads: the loop's shared ones are for short work only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

from sollold.tasks import retrieve_error

P = ParamSpec("P")
T = TypeVar("T")

_NICE = 10


async def in_thread(threads: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of ``work``. Even if cancelled, any number of times, waits for its end unless it has
    not begun: files that it uses may be closed afterwards.
    """
    return await in_stoppable_thread(threads, lambda: None, work, *args, **kwargs)


async def in_stoppable_thread(
    threads: Executor, stop: Callable[[], None], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Like `in_thread`, but if cancelled, call ``stop``, which must make ``work`` end soon."""
    job = threads.submit(work, *args, **kwargs)
    waiting = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not job.cancel():
            stop()
            while not waiting.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({waiting})
            retrieve_error(waiting)
        raise


def lower_priority() -> None:
    """Lower the priority of a thread that copies or compares much, in favour of engines and the loop.

    Not for threads that run much Python code: other threads would wait longer for the GIL.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def in_own_thread(work: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Return the result of ``work``, run in a thread of its own, which does not delay the daemon's exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    # If the caller is gone, nobody retrieves the exception.
    future.add_done_callback(retrieve_error)

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
