"""Fills a partial file from one or more sources at a time, over several connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol, runtime_checkable

from sollold.errors import system_words
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.partial_file import PartialFile
from sollold.models.transfer.rate_limit import RateLimit
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.models")

_BATCH = 4 << 20
"""Size of the batches that a thread writes, in bytes."""
_MAX_FAILURES = 5
"""Consecutive failures after which a source is given up: some eight seconds, so that it may restart."""


class SourceError(Exception):
    """A source broke off or refused; the message says which one and why.

    ``final``: it would refuse again, so it is given up at once.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class CheckLost(SourceError):
    """No node can verify the parts any more; trying other sources does not help."""


@runtime_checkable
class Source(Protocol):
    """A source of the files of a partial download.

    Attributes:
        patience: seconds for which it is tried again while nothing can be received from it; at least
            some eight.
    """

    name: str
    patience: float

    def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes]:
        """Yield bytes of one file, in order.

        Raises:
            SourceError: the source broke off.
        """
        ...


class Stop:
    """Stops the work of a thread: the socket that it waits for is shut down."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def stopped(self) -> bool:
        """Whether the thread should stop."""
        return self._stopped.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            SourceError: stopped, before or during the sleep.
        """
        if self._stopped.wait(seconds):
            raise SourceError("it was stopped")

    def use_socket(self, current: socket.socket | None) -> None:
        """Set the socket that the thread waits for; None: no socket.

        Raises:
            SourceError: stopped.
        """
        with self._lock:
            self._socket = current
            if self.stopped and current is not None:
                raise SourceError("it was stopped")

    def stop(self) -> None:
        """Stop the thread, even while it waits for its socket."""
        with self._lock:
            self._stopped.set()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


class BlockingSource(Protocol):
    """Like `Source`, for use in a thread, and without patience."""

    name: str

    def fetch_range(
        self, index: int, start: int, end: int, write: Callable[[int, memoryview], None], stop: Stop
    ) -> None:
        """Fetch bytes of one file and ``write`` them at their offsets. Blocks.

        Raises:
            SourceError: the source broke off, or ``stop`` was set.
        """
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


Check = Callable[[int, int], Awaitable[bool]]
"""Returns whether the received bytes of a part (file, part) are correct."""


class Downloader:
    """Fills one partial file. Call `run`; `received` shows the progress."""

    def __init__(
        self,
        partial: PartialFile,
        sources: Sequence[Source | BlockingSource],
        pace: RateLimit,
        threads: Executor,
        *,
        connections: int = 4,
        check: Check | None = None,
        on_progress: Callable[[], None] = lambda: None,
        on_retry: Callable[[str], None] = lambda reason: None,
        pause: float = 0.5,
    ) -> None:
        """``threads`` do the blocking work; ``check``: see `Check`; None: every part is accepted.

        ``on_retry`` is called with the reason when a source that has failed repeatedly is tried again.
        ``pause``: seconds before a failed source is tried again; doubled with each failure.
        """
        self._threads = threads
        self._check = check
        self._partial = partial
        self._sources = list(sources)
        self._failures = dict.fromkeys(sources, 0)
        self._retry_at: dict[Source | BlockingSource, float] = {}
        self._failing_since: dict[Source | BlockingSource, float] = {}
        self._pace = pace
        self._connections = connections
        self._on_progress = on_progress
        self._on_retry = on_retry
        self._pause = pause
        self._under_way: dict[tuple[int, int], int] = {}
        self._last = ""

    def received(self, index: int) -> int:
        """Return the received bytes of one file, including those of incomplete parts."""
        under_way = sum(count for (file, _), count in self._under_way.items() if file == index)
        return self._partial.completed_of(index) + under_way

    async def run(self) -> None:
        """Fetch all missing parts.

        Raises:
            SourceError: every source failed; completed parts are kept for the next attempt.
            OSError: writing failed, for example because the disk is full.
        """
        parts = self._partial.missing()[::-1]
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for turn in range(min(self._connections, len(parts))):
                    group.create_task(self._work(parts, turn))
        except* (SourceError, OSError) as errors:
            check_errors = (error for error in errors.exceptions if isinstance(error, CheckLost))
            failure = next(check_errors, errors.exceptions[0])
        if failure is not None:
            raise failure

    async def _work(self, parts: list[tuple[int, int]], turn: int) -> None:
        while parts:
            index, part = parts.pop()
            while True:
                if not self._sources:
                    raise SourceError(self._last or "there is no source to fetch it from")
                source = self._sources[turn % len(self._sources)]
                try:
                    await self._fetch(source, index, part)
                except CheckLost:
                    raise
                except SourceError as error:
                    turn += 1
                    await self._failed(source, error)
                else:
                    self._failures[source] = 0
                    self._failing_since.pop(source, None)
                    break

    async def _failed(self, source: Source | BlockingSource, error: SourceError) -> None:
        """Count a failure and wait. All connections to a node break at once, which counts as one failure."""
        self._last = str(error)
        now = time.monotonic()
        failing = now - self._failing_since.setdefault(source, now)
        if now >= self._retry_at.get(source, 0.0):
            log.info("fetching from %s: %s", source.name, error)
            self._failures[source] += 1
            pause = min(5.0, self._pause * 2 ** (self._failures[source] - 1))
            self._retry_at[source] = now + pause
        patience = source.patience if isinstance(source, Source) else 0.0
        if error.final or (self._failures[source] >= _MAX_FAILURES and failing >= patience):
            with contextlib.suppress(ValueError):  # another connection has given it up
                self._sources.remove(source)
        if self._sources:
            if self._failures[source] > 1:
                self._on_retry(str(error))
            await asyncio.sleep(max(0.0, self._retry_at[source] - now))

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
        start, end = self._partial.span(index, part)
        stop = Stop()
        faults: list[OSError] = []
        # Set it before the thread starts: the loop iterates over this dict.
        self._under_way[index, part] = 0

        def write(offset: int, data: memoryview) -> None:
            try:
                self._partial.write(index, offset, data)
            except OSError as error:
                # The source would mistake an OSError for a fault of its own connection.
                faults.append(error)
                raise SourceError(f"it can't be written here: {system_words(error)}") from None
            self._under_way[index, part] = offset + len(data) - start
            stop.pause(self._pace.wait(len(data), time.monotonic()))

        fetching = asyncio.ensure_future(
            in_thread(self._threads, source.fetch_range, index, start, end, write, stop)
        )
        try:
            while not (await asyncio.wait({fetching}, timeout=0.25))[0]:
                self._on_progress()
            fetching.result()
        except SourceError:
            if faults:
                raise faults[0] from None
            raise
        finally:
            stop.stop()
            if not fetching.done():
                await cancel_and_wait(fetching)
        await self._finish(source, index, part)

    async def _finish(self, source: Source | BlockingSource, index: int, part: int) -> None:
        """Check and store a part whose bytes have all been received.

        Raises:
            SourceError: they are wrong, or can't be verified (`CheckLost`).
        """
        if self._check is not None and not await self._check(index, part):
            raise SourceError(f"{source.name} sent bytes that differ from the model's")
        await in_thread(self._threads, self._partial.finish_part, index, part)

    async def _stream(self, source: Source, index: int, part: int) -> None:
        start, end = self._partial.span(index, part)
        offset, batch = start, bytearray()
        writing: asyncio.Future[None] | None = None
        stream = source.read(index, start, end)
        try:
            async for piece in stream:
                batch += piece
                self._under_way[index, part] = self._under_way.get((index, part), 0) + len(piece)
                if offset + len(batch) > end:
                    raise SourceError(f"{source.name} sent more than was requested")
                if len(batch) >= _BATCH:
                    if writing is not None:
                        await writing
                    work = in_thread(self._threads, self._partial.write, index, offset, batch)
                    writing = asyncio.ensure_future(work)
                    offset, batch = offset + len(batch), bytearray()
                    self._on_progress()
                if delay := self._pace.wait(len(piece), time.monotonic()):
                    await asyncio.sleep(delay)
            if offset + len(batch) != end:
                raise SourceError(
                    f"{source.name} ended after {offset + len(batch) - start} of {end - start} bytes"
                )
            if writing is not None:
                await writing
            await in_thread(self._threads, self._partial.write, index, offset, batch)
        finally:
            if writing is not None and not writing.done():
                # The thread keeps writing whatever happens here: the file must stay open until it is done.
                await asyncio.gather(writing, return_exceptions=True)
        await self._finish(source, index, part)
