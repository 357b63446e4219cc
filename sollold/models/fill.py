"""Filling a landing from one or more sources at a time, over several connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, runtime_checkable

from sollold.models.landing import Landing
from sollold.models.pace import Pace

log = logging.getLogger("sollold.models")

_BATCH = 4 << 20
"""Bytes gathered before they are handed to a thread for writing."""
_FAILURES = 5
"""Failures in a row after which a source is given up: some eight seconds, so that it may be started anew."""


class SourceError(Exception):
    """A source broke off or refused; the message says which and why."""


@runtime_checkable
class Source(Protocol):
    """Something that has the files of a landing."""

    name: str

    def read(self, index: int, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of one file, in order.

        Raises:
            SourceError: it broke off.
        """
        ...


class Stop:
    """Ends the work of a thread: what it waits for is closed under it."""

    def __init__(self) -> None:
        self.stopped = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def use(self, used: socket.socket | None) -> None:
        """The thread waits for this socket from now on; None: for none.

        Raises:
            SourceError: it was stopped.
        """
        with self._lock:
            self._socket = used
            if self.stopped and used is not None:
                raise SourceError("it was stopped")

    def stop(self) -> None:
        """Wake the thread, whatever it waits for."""
        with self._lock:
            self.stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


class BlockingSource(Protocol):
    """As `Source`, for a thread."""

    name: str

    def take(
        self, index: int, start: int, end: int, write: Callable[[int, memoryview], None], stop: Stop
    ) -> None:
        """Fetch bytes of one file and ``write`` them where they belong. Blocks.

        Raises:
            SourceError: it broke off, or ``stop`` was set.
        """
        ...


class Fill:
    """One filling. `run` it; `received` shows how far it is."""

    def __init__(
        self,
        landing: Landing,
        sources: Sequence[Source | BlockingSource],
        pace: Pace,
        *,
        connections: int = 4,
        on_progress: Callable[[], None] = lambda: None,
        pause: float = 0.5,
    ) -> None:
        """``pause``: seconds before a source that failed is asked again; doubled with each failure."""
        self._landing = landing
        self._sources = list(sources)
        self._failures = {source.name: 0 for source in sources}
        self._retry_at: dict[str, float] = {}
        self._pace = pace
        self._connections = connections
        self._on_progress = on_progress
        self._pause = pause
        self._under_way: dict[tuple[int, int], int] = {}
        self._last = ""

    def received(self, index: int) -> int:
        """Bytes of one file that have come, parts under way included."""
        under_way = sum(count for (file, _), count in self._under_way.items() if file == index)
        return self._landing.completed_of(index) + under_way

    async def run(self) -> None:
        """Fetch all that is missing.

        Raises:
            SourceError: every source failed; what came is kept for the next attempt.
            OSError: the disk is full, say.
        """
        left = self._landing.missing()[::-1]
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for turn in range(min(self._connections, len(left))):
                    group.create_task(self._work(left, turn))
        except* (SourceError, OSError) as errors:
            failure = errors.exceptions[0]
        if failure is not None:
            raise failure

    async def _work(self, left: list[tuple[int, int]], turn: int) -> None:
        while left:
            index, part = left.pop()
            while True:
                if not self._sources:
                    raise SourceError(self._last or "there is nobody to fetch it from")
                source = self._sources[turn % len(self._sources)]
                try:
                    await self._fetch(source, index, part)
                except SourceError as error:
                    turn += 1
                    await self._failed(source, error)
                else:
                    self._failures[source.name] = 0
                    break

    async def _failed(self, source: Source | BlockingSource, error: SourceError) -> None:
        """Count it, and wait. All connections to a node break at once: together they count as one failure."""
        self._last = str(error)
        now = time.monotonic()
        if now >= self._retry_at.get(source.name, 0.0):
            log.info("fetching from %s: %s", source.name, error)
            self._failures[source.name] += 1
            pause = min(5.0, self._pause * 2 ** (self._failures[source.name] - 1))
            self._retry_at[source.name] = now + pause
        if self._failures[source.name] >= _FAILURES and source in self._sources:
            self._sources.remove(source)
        if self._sources:
            await asyncio.sleep(max(0.0, self._retry_at[source.name] - now))

    async def _fetch(self, source: Source | BlockingSource, index: int, part: int) -> None:
        try:
            if isinstance(source, Source):
                await self._stream(source, index, part)
            else:
                await self._take(source, index, part)
        finally:
            self._under_way.pop((index, part), None)
            self._on_progress()

    async def _take(self, source: BlockingSource, index: int, part: int) -> None:
        start, end = self._landing.span(index, part)
        stop = Stop()

        def write(offset: int, data: memoryview) -> None:
            self._landing.write(index, offset, data)
            self._under_way[index, part] = offset + len(data) - start
            if delay := self._pace.wait(len(data), time.monotonic()):
                time.sleep(delay)
            if stop.stopped:
                raise SourceError("it was stopped")

        def work() -> None:
            source.take(index, start, end, write, stop)
            self._landing.finish_part(index, part)

        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while not (await asyncio.wait({working}, timeout=0.25))[0]:
                self._on_progress()
            working.result()
        finally:
            stop.stop()
            # The file must stay open until the thread is through.
            await asyncio.gather(working, return_exceptions=True)

    async def _stream(self, source: Source, index: int, part: int) -> None:
        start, end = self._landing.span(index, part)
        at, batch, writing = start, bytearray(), None
        stream = source.read(index, start, end)
        try:
            async for piece in stream:
                batch += piece
                self._under_way[index, part] = self._under_way.get((index, part), 0) + len(piece)
                if at + len(batch) > end:
                    raise SourceError(f"{source.name} sent more than was asked for")
                if len(batch) >= _BATCH:
                    if writing is not None:
                        await writing
                    writing = asyncio.ensure_future(asyncio.to_thread(self._landing.write, index, at, batch))
                    at, batch = at + len(batch), bytearray()
                    self._on_progress()
                if delay := self._pace.wait(len(piece), time.monotonic()):
                    await asyncio.sleep(delay)
            if at + len(batch) != end:
                raise SourceError(
                    f"{source.name} ended after {at + len(batch) - start} of {end - start} bytes"
                )
            if writing is not None:
                await writing
            writing = asyncio.ensure_future(self._finish(index, part, at, batch))
            await asyncio.shield(writing)
        finally:
            if writing is not None and not writing.done():
                # The thread writes on whatever happens here: the file must stay open until it is through.
                await asyncio.gather(writing, return_exceptions=True)

    async def _finish(self, index: int, part: int, at: int, batch: bytearray) -> None:
        def finish() -> None:
            self._landing.write(index, at, batch)
            self._landing.finish_part(index, part)

        await asyncio.to_thread(finish)
