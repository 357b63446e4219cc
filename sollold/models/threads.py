"""Blocking work of transfers, in threads of their own: the loop's shared ones are for everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
