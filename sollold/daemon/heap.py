"""Keeps the daemon small: one malloc arena, no idle threads, and unused memory returned to the system."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sollold.retry import LogAndRetry

log = logging.getLogger("sollold")

_ARENA_MAX = -8
"""``M_ARENA_MAX`` of glibc's malloc.h."""
_DONTNEED = 4
"""``MADV_DONTNEED`` of Linux's mman.h."""
_START_SECONDS, _PERIOD_SECONDS = 10.0, 60.0
"""Seconds between clean-ups: for the first two, and from then on."""
_READ_ONLY = ("r--p", "r-xp")

Span = tuple[int, int, str]
"""An address range: start, end (exclusive), and the library or program mapped there."""


def use_one_arena() -> None:
    """Have glibc's malloc keep one arena; call it before threads are started.

    By default it makes several per core, and memory freed in them by threads for files and hashes stays with
    the process: 30 MB after a few loads. Does nothing without glibc.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


class ThreadPool(Protocol):
    """Threads that run from time to time."""

    def end_idle_threads(self) -> None:
        """End the threads unless one of them is needed now."""


async def trim_periodically(pools: Sequence[ThreadPool]) -> None:
    """Return memory that only the start needed, then unused memory every minute, until cancelled.

    Idle threads of ``pools`` and of the loop's executor end too: an executor keeps all that it has started.
    """
    memory = ReclaimableMemory()
    loop = asyncio.get_running_loop()
    attempt = LogAndRetry("returning unused memory", log)
    pauses = iter((_START_SECONDS, _START_SECONDS))
    executor: ThreadPoolExecutor | None = None
    while True:
        await asyncio.sleep(next(pauses, _PERIOD_SECONDS))
        with attempt:
            for pool in pools:
                pool.end_idle_threads()
            former, executor = executor, ThreadPoolExecutor(thread_name_prefix="loop")
            loop.set_default_executor(executor)
            if former is not None:
                former.shutdown(wait=False)  # its threads finish their work first
            await asyncio.to_thread(memory.give_back)


class ReclaimableMemory:
    """Memory that can be returned to the system: free memory, and library pages that may not be needed again.

    A page that is needed after all is mapped again within a microsecond, from the page cache. Of 27 MB of
    such pages an idle daemon uses 16.
    """

    def __init__(self, process: Path = Path("/proc/self")) -> None:
        self._process = process
        self._program = str((process / "exe").resolve())
        self._previous: frozenset[Span] = frozenset()
        self._settled: frozenset[Span] = frozenset()
        self._clean: frozenset[Span] = frozenset()

    def give_back(self) -> None:
        """Return the memory; blocks for some milliseconds. Does nothing except on Linux with glibc."""
        with contextlib.suppress(OSError, AttributeError):
            spans = self.unchanged()
            libc = ctypes.CDLL(None)
            libc.malloc_trim(0)
            for begin, end, _ in spans:
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)

    def unchanged(self) -> frozenset[Span]:
        """Return read-only, never modified mappings of libraries that already existed at the previous call.

        That excludes libraries' address tables, written during loading. A new mapping may belong to a
        library that another thread is just loading.

        Raises:
            OSError: the system has no ``/proc/PID/smaps`` (proc(5)).
        """
        current = frozenset(self._spans("maps"))
        settled = current & self._previous
        if not settled <= self._settled:
            # This takes longer: the kernel walks the pages of each mapping.
            self._clean = frozenset(self._spans("smaps")) & settled
            self._settled = settled
        self._clean &= current
        self._previous = current
        return self._clean

    def _spans(self, table: str) -> Iterator[Span]:
        span: Span | None = None
        with (self._process / table).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                if words[0].endswith(":"):
                    if span is not None and words[:2] == ["Anonymous:", "0"]:
                        yield span
                    continue
                span = self._span(words)
                if span is not None and table == "maps":
                    yield span

    def _span(self, words: list[str]) -> Span | None:
        path = words[5].strip() if len(words) > 5 else ""
        if words[1] not in _READ_ONLY or not (".so" in path or path == self._program):
            return None
        begin, _, end = words[0].partition("-")
        return int(begin, 16), int(end, 16), path
