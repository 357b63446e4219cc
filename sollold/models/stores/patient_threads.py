"""Threads that many reads share, of files on several places: one that does not answer takes none from others.

A read of a share whose server is away keeps its thread. Its place among those that work at a time is given to
another one after some seconds, and until it has ended nothing more is read from that folder.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from sollold.models.stores.patient_read import PATIENCE, no_answer

P = ParamSpec("P")
T = TypeVar("T")

_STUCK = 16
"""Times as many threads there may be as work at a time: those of folders that do not answer."""


class PatientThreads:
    """So many reads at a time. On the loop.

    Args:
        most: reads at a time.
        seconds: after which nobody waits for one any more.
        begin: called in each thread first.
    """

    def __init__(
        self, most: int, name: str, seconds: float = PATIENCE, begin: Callable[[], None] = lambda: None
    ) -> None:
        self._threads = ThreadPoolExecutor(most * _STUCK, thread_name_prefix=name, initializer=begin)
        self._slots = asyncio.Semaphore(most)
        self._seconds = seconds
        self._silent: Counter[str] = Counter()

    def close(self) -> None:
        """Begin no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, path: str | Path, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``work`` gives, which blocks while it reads ``path``, and opens and closes what it reads.

        Raises:
            LookupError: the folder did not answer in time, or one before has waited for it in vain since.
        """
        # Whoever asked may go: what reads for nobody counts all the same until it has ended.
        reading = asyncio.ensure_future(self._run(str(Path(path).parent), partial(work, *args, **kwargs)))
        reading.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return await asyncio.shield(reading)

    async def _run(self, place: str, work: Callable[[], T]) -> T:
        self._check(place)
        async with self._slots:
            self._check(place)
            job = self._threads.submit(work)
            waiting = asyncio.wrap_future(job)
            await asyncio.wait({waiting}, timeout=self._seconds)
        if waiting.done():
            return waiting.result()
        waiting.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        self._silent[place] += 1
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda ended: self._answers(loop, place))
        raise LookupError(no_answer(place))

    def _check(self, place: str) -> None:
        if self._silent[place] > 0:
            raise LookupError(no_answer(place))

    def _answers(self, loop: asyncio.AbstractEventLoop, place: str) -> None:
        """In its thread: a read that nobody waits for has come to its end."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._silent.subtract, {place: 1})
