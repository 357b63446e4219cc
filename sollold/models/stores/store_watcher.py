"""Scans one store in threads of its own.

A network share whose server is down blocks any thread that touches it, for minutes or forever. It must
neither keep other stores from being scanned nor the daemon from exiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from sollold.errors import system_words
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.stores.patient_read import no_answer
from sollold.models.stores.scan_result import Problem, Scan
from sollold.models.stores.threads import in_own_thread

SILENT = 30.0
"""Seconds without progress of a scan after which the store counts as unresponsive."""
_CHECK_SECONDS = 1.0
"""Timeout for checking all stores for changes in one thread, in seconds."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The result of scanning a store: the listing, its models, and the cache keys of their headers."""

    scan: Scan
    models: tuple[Model, ...]
    headers: frozenset[str]


Look = Callable[[Callable[[], None]], Seen]
"""Scans a store. Blocks; calls its argument whenever it makes progress."""


class Store:
    """A store and the state of its scans. Use it on the loop."""

    def __init__(self, place: str, look: Look) -> None:
        """``place``: its path, for display."""
        self.place = place
        self.seen: Seen | None = None
        """Result of the last successful scan."""
        self.fault: Exception | None = None
        """Exception of the last scan, if it failed."""
        self._scan = look
        self._job: asyncio.Future[Seen | None] | None = None
        self._progress_at = 0.0

    @property
    def job(self) -> asyncio.Future[Seen | None] | None:
        """The scan under way."""
        return self._job

    @property
    def silent(self) -> bool:
        """Whether the store does not respond."""
        return self._job is not None and time.monotonic() - self._progress_at > SILENT

    @property
    def unread(self) -> bool:
        """Whether the store is being scanned for the first time."""
        return self.seen is None and self._job is not None and not self.silent

    def begin(self, *, force: bool) -> bool:
        """Start a scan if anything has changed, or anyway (``force``); return False if one is under way."""
        if self._job is not None:
            return False
        self._note_progress()
        seen = None if force else self.seen
        self._job = in_own_thread(lambda: self._scan_if_changed(seen), name=f"look at {self.place}")
        return True

    def take_result(self) -> bool:
        """Take over the result of a scan that has ended; return whether anything is different now."""
        if self._job is None or not self._job.done():
            return False
        job, self._job = self._job, None
        fault = job.exception()
        if fault is not None and not isinstance(fault, Exception):
            raise fault
        changed, self.fault = str(fault or "") != str(self.fault or ""), fault
        seen = None if fault else job.result()
        self.seen = seen or self.seen
        return changed or seen is not None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Problems that keep its models from being used."""
        found = tuple(self.seen.scan.problems) if self.seen else ()
        if self.silent:
            return (*found, Problem(no_answer(self.place, ", so its models can't be used")))
        if self.fault is not None:
            return (*found, Problem(f"{self.place} can't be checked: {system_words(self.fault)}"))
        return found

    @property
    def models(self) -> tuple[Model, ...]:
        """Its models as last seen; all are unusable while the store does not respond."""
        models = self.seen.models if self.seen else ()
        if not self.silent:
            return models
        reason = no_answer(self.place)
        return tuple(replace(model, unusable=model.unusable or reason) for model in models)

    def _scan_if_changed(self, seen: Seen | None) -> Seen | None:
        """Scan in a thread; return None if nothing has changed."""
        if seen is not None and not seen.scan.changed():
            return None
        return self._scan(self._note_progress)

    def _note_progress(self) -> None:
        self._progress_at = time.monotonic()


async def unchanged(stores: Iterable[Store]) -> frozenset[Store]:
    """Return the stores that have not changed since they were last scanned, all checked by one thread.

    A store that blocks the check is not among them, nor are those after it: each is then scanned in its own
    thread.
    """
    scans = {store: store.seen.scan for store in stores if store.seen and not (store.job or store.fault)}
    found: list[Store] = []

    def check() -> None:
        for store, scan in scans.items():
            if not scan.changed():
                found.append(store)

    job = in_own_thread(check, name="look at the stores")
    await asyncio.wait({job}, timeout=_CHECK_SECONDS)
    return frozenset(found)
