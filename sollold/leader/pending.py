"""What is being placed, or fetched from another node first, for those who wait; and its end by order.

Pure but for the tasks: the time is passed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

from sollold.facts import dataclass
from sollold.leader.messages import Ensure, Ensured

STILL_WAITED_FOR = 3.0
"""Seconds since the last question about a file on its way, within which somebody waits for it."""
FETCH_ENDS = 60.0
"""Seconds without a question after which its node has given the fetch up by itself."""
LONGEST_WAIT = 24 * 3600.0
"""Seconds after which nobody waits any more who did when a load was cancelled."""


@dataclass(frozen=True, slots=True)
class PendingFetch:
    """A file that ``node`` was told to get from another node, and when that was asked about last."""

    node: str
    model: str
    digest: str
    asked: float


@dataclass(frozen=True, slots=True)
class _Job:
    model: str
    task: asyncio.Task[Ensured]


class PendingLoads:
    """Placements under way by what was asked for, fetches by node and content, and what was cancelled."""

    def __init__(self) -> None:
        self._jobs: dict[Ensure, _Job] = {}
        self._fetches: dict[tuple[str, str], PendingFetch] = {}
        self._cancelled: dict[str, float] = {}
        """Model → when its loads were cancelled."""

    def job(self, key: Ensure) -> asyncio.Task[Ensured] | None:
        """The placement under way for ``key``."""
        found = self._jobs.get(key)
        return found.task if found is not None else None

    def start(self, key: Ensure, model: str, work: Coroutine[Any, Any, Ensured]) -> asyncio.Task[Ensured]:
        """Begin a placement. It counts until it is done."""
        task = asyncio.create_task(work, name=f"placing {model}")
        self._jobs[key] = _Job(model.lower(), task)
        task.add_done_callback(lambda _: self._jobs.pop(key, None))
        return task

    def tasks(self) -> list[asyncio.Task[Ensured]]:
        """All placements under way."""
        return [job.task for job in self._jobs.values()]

    def asked_for(self, fetch: PendingFetch) -> None:
        """A file is on its way, for somebody who asked."""
        self._fetches = {
            key: one for key, one in self._fetches.items() if fetch.asked - one.asked < FETCH_ENDS
        }
        self._fetches[fetch.node, fetch.digest] = fetch

    def came_to_an_end(self, node: str, digest: str) -> None:
        """A file has come, or will not."""
        self._fetches.pop((node, digest), None)

    def waited_for(self, names: Collection[str], now: float) -> bool:
        """Whether somebody waits for a model of these names (in lower case) that is not loading yet."""
        return any(job.model in names for job in self._jobs.values()) or any(
            now - one.asked < STILL_WAITED_FOR for one in self._fetches_of(names)
        )

    def cancel(
        self, names: Collection[str], now: float
    ) -> tuple[list[asyncio.Task[Ensured]], list[PendingFetch]]:
        """Cancel what is pending for models of these names (in lower case), and say what that was: the
        caller tells the nodes that fetch."""
        jobs = [job.task for job in self._jobs.values() if job.model in names]
        fetches = [one for one in self._fetches_of(names) if now - one.asked < FETCH_ENDS]
        for job in jobs:
            job.cancel()
        for fetch in fetches:
            self.came_to_an_end(fetch.node, fetch.digest)
        if jobs or fetches:
            self._cancelled = {key: at for key, at in self._cancelled.items() if now - at < LONGEST_WAIT}
            self._cancelled |= dict.fromkeys(names, now)
        return jobs, fetches

    def is_cancelled(self, model: str, began: float) -> bool:
        """Whether somebody who waits for ``model`` since ``began`` waits for what was cancelled."""
        at = self._cancelled.get(model.lower())
        return at is not None and began <= at

    def _fetches_of(self, names: Collection[str]) -> list[PendingFetch]:
        return [one for one in self._fetches.values() if one.model.lower() in names]
