"""Tracks placements and file fetches under way for waiting callers, and cancels them.

Pure except for the tasks: the time is passed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

from sollold.facts import dataclass
from sollold.leader.messages import Ensure, Ensured

STILL_WAITED_FOR = 3.0
"""Seconds after the last request for a file being fetched during which a caller counts as waiting."""
FETCH_ENDS = 60.0
"""Seconds without a request after which the fetching node has stopped by itself."""
LONGEST_WAIT = 24 * 3600.0
"""Seconds after which no caller still waits that did when a load was cancelled."""


@dataclass(frozen=True, slots=True)
class PendingFetch:
    """A file that ``node`` was told to fetch from another node; ``asked``: time of the last request."""

    node: str
    model: str
    digest: str
    asked: float


@dataclass(frozen=True, slots=True)
class _Job:
    model: str
    task: asyncio.Task[Ensured]


class PendingLoads:
    """Placements under way by request, fetches by node and content, and cancelled loads."""

    def __init__(self) -> None:
        self._jobs: dict[Ensure, _Job] = {}
        self._fetches: dict[tuple[str, str], PendingFetch] = {}
        self._cancelled: dict[str, float] = {}
        """Time at which each model's loads were cancelled."""

    def job(self, key: Ensure) -> asyncio.Task[Ensured] | None:
        """Return the placement under way for ``key``, if any."""
        found = self._jobs.get(key)
        return found.task if found is not None else None

    def start(self, key: Ensure, model: str, work: Coroutine[Any, Any, Ensured]) -> asyncio.Task[Ensured]:
        """Start a placement, which is tracked until it is done."""
        task = asyncio.create_task(work, name=f"placing {model}")
        self._jobs[key] = _Job(model.lower(), task)
        task.add_done_callback(lambda _: self._jobs.pop(key, None))
        return task

    def tasks(self) -> list[asyncio.Task[Ensured]]:
        """Return all placements under way."""
        return [job.task for job in self._jobs.values()]

    def note_request(self, fetch: PendingFetch) -> None:
        """Note that a caller waits for a file that is being fetched."""
        self._fetches = {
            key: earlier for key, earlier in self._fetches.items() if fetch.asked - earlier.asked < FETCH_ENDS
        }
        self._fetches[fetch.node, fetch.digest] = fetch

    def fetch_ended(self, node: str, digest: str) -> None:
        """Note that a fetch has finished or failed."""
        self._fetches.pop((node, digest), None)

    def waited_for(self, names: Collection[str], now: float) -> bool:
        """Return whether a caller waits for a model of these names (lower case) that is not loading yet."""
        return any(job.model in names for job in self._jobs.values()) or any(
            now - fetch.asked < STILL_WAITED_FOR for fetch in self._fetches_of(names)
        )

    def cancel(
        self, names: Collection[str], now: float
    ) -> tuple[list[asyncio.Task[Ensured]], list[PendingFetch]]:
        """Cancel what is pending for models of these names (lower case), and return it.

        The caller must tell the nodes to stop the fetches.
        """
        jobs = [job.task for job in self._jobs.values() if job.model in names]
        fetches = [fetch for fetch in self._fetches_of(names) if now - fetch.asked < FETCH_ENDS]
        for job in jobs:
            job.cancel()
        for fetch in fetches:
            self.fetch_ended(fetch.node, fetch.digest)
        if jobs or fetches:
            self._cancelled = {
                key: time for key, time in self._cancelled.items() if now - time < LONGEST_WAIT
            }
            self._cancelled |= dict.fromkeys(names, now)
        return jobs, fetches

    def is_cancelled(self, model: str, began: float) -> bool:
        """Return whether ``model`` was cancelled for a caller that has been waiting since ``began``."""
        cancelled = self._cancelled.get(model.lower())
        return cancelled is not None and began <= cancelled

    def _fetches_of(self, names: Collection[str]) -> list[PendingFetch]:
        return [fetch for fetch in self._fetches.values() if fetch.model.lower() in names]
