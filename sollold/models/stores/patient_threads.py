"""A pool of threads for reads of files in several places; a blocked read does not block other places.

A read of a share whose server is down blocks its thread. After some seconds its slot is given to another
read, and until it ends nothing more is read from that folder.
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
from sollold.tasks import retrieve_error

P = ParamSpec("P")
T = TypeVar("T")


class PatientThreads:
    """Runs a limited number of reads at a time. Use it on the loop.

    Args:
        most: maximum number of concurrent reads.
        seconds: timeout of one read.
        begin: called first in each thread.
    """

    def __init__(
        self, most: int, name: str, seconds: float = PATIENCE, begin: Callable[[], None] = lambda: None
    ) -> None:
        self._new_pool = partial(ThreadPoolExecutor, most, thread_name_prefix=name, initializer=begin)
        self._pool = self._new_pool()
        self._closed = False
        self._slots = asyncio.Semaphore(most)
        self._reads = 0
        """Reads that wait or run."""
        self._seconds = seconds
        self._silent: Counter[str] = Counter()

    def close(self) -> None:
        """Start no more reads."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def end_idle(self) -> None:
        """End the threads if nothing is read."""
        if not self._reads and not self._closed:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()

    async def run(self, path: str | Path, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of ``work``, which blocks while it reads ``path``.

        It must open and close the files that it reads.

        Raises:
            LookupError: the folder did not respond in time, or an earlier read of it that timed out is still
                blocked.
        """
        # The caller may be cancelled: its read still counts until it has ended.
        reading = asyncio.ensure_future(self._run(str(Path(path).parent), partial(work, *args, **kwargs)))
        reading.add_done_callback(retrieve_error)
        return await asyncio.shield(reading)

    async def _run(self, place: str, work: Callable[[], T]) -> T:
        self._check(place)
        self._reads += 1
        try:
            async with self._slots:
                self._check(place)
                pool = self._pool
                job = pool.submit(work)
                waiting = asyncio.wrap_future(job)
                await asyncio.wait({waiting}, timeout=self._seconds)
        finally:
            self._reads -= 1
        if waiting.done():
            return waiting.result()
        waiting.add_done_callback(retrieve_error)
        self._silent[place] += 1
        if pool is self._pool and not self._closed:
            # One of its threads is blocked, possibly forever; the others end with their reads.
            pool.shutdown(wait=False)
            self._pool = self._new_pool()
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda ended: self._read_ended(loop, place))
        raise LookupError(no_answer(place))

    def _check(self, place: str) -> None:
        if self._silent[place] > 0:
            raise LookupError(no_answer(place))

    def _read_ended(self, loop: asyncio.AbstractEventLoop, place: str) -> None:
        """Called in the read's thread when a read that had timed out has ended."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._silent.subtract, {place: 1})
