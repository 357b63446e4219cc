"""One place with models, looked at in threads of its own.

A network share whose server is away blocks any thread that touches it, for minutes or for ever: it must keep
neither the other places from being seen, nor the daemon from ending.
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
from sollold.models.stores.threads import alone

SILENT = 30.0
"""Seconds without a sign of a look getting on after which the place counts as one that does not answer."""
_AT_ONCE = 1.0
"""Seconds that all places together may keep one thread busy."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at a place gave: its models as they are listed there, and the keys of their headers."""

    scan: Scan
    models: tuple[Model, ...]
    headers: frozenset[str]


Look = Callable[[Callable[[], None]], Seen]
"""Looks at a place. Blocks; calls what it is given whenever it gets on."""


class Store:
    """A place and what is known of it. Use it on the loop."""

    def __init__(self, place: str, look: Look) -> None:
        """``place``: its path, for people."""
        self.place = place
        self.seen: Seen | None = None
        """What the last look that ended well gave."""
        self.fault: Exception | None = None
        """What ended the last look, if anything did."""
        self._look = look
        self._job: asyncio.Future[Seen | None] | None = None
        self._sign = 0.0

    @property
    def job(self) -> asyncio.Future[Seen | None] | None:
        """The look that is under way."""
        return self._job

    @property
    def silent(self) -> bool:
        """Whether it does not answer."""
        return self._job is not None and time.monotonic() - self._sign > SILENT

    @property
    def unread(self) -> bool:
        """Whether it is being read for the first time."""
        return self.seen is None and self._job is not None and not self.silent

    def begin(self, *, anew: bool) -> bool:
        """Look, if anything there has changed or in any case (``anew``); False while a look is under way."""
        if self._job is not None:
            return False
        self._get_on()
        seen = None if anew else self.seen
        self._job = alone(lambda: self._looked(seen), name=f"look at {self.place}")
        return True

    def take_result(self) -> bool:
        """Take over what a look gave that has ended; whether anything is different now."""
        if self._job is None or not self._job.done():
            return False
        job, self._job = self._job, None
        fault = job.exception()
        if fault is not None and not isinstance(fault, Exception):
            raise fault
        other, self.fault = str(fault or "") != str(self.fault or ""), fault
        seen = None if fault else job.result()
        self.seen = seen or self.seen
        return other or seen is not None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps its models from being seen."""
        found = tuple(self.seen.scan.problems) if self.seen else ()
        if self.silent:
            return (*found, Problem(no_answer(self.place, ", so its models can't be used")))
        if self.fault is not None:
            return (*found, Problem(f"{self.place} can't be checked: {system_words(self.fault)}"))
        return found

    @property
    def models(self) -> tuple[Model, ...]:
        """Its models as last seen; none can be run while it does not answer."""
        models = self.seen.models if self.seen else ()
        if not self.silent:
            return models
        reason = no_answer(self.place)
        return tuple(replace(one, unusable=one.unusable or reason) for one in models)

    def _looked(self, seen: Seen | None) -> Seen | None:
        """In a thread; None when nothing has changed."""
        if seen is not None and not seen.scan.changed():
            return None
        return self._look(self._get_on)

    def _get_on(self) -> None:
        self._sign = time.monotonic()


async def unchanged(stores: Iterable[Store]) -> frozenset[Store]:
    """The stores that are as they were seen last. One thread asks them all, one after the other.

    One that keeps it waiting is not among them, nor are those behind it: they are to be looked at each by
    its own thread.
    """
    scans = {store: store.seen.scan for store in stores if store.seen and not (store.job or store.fault)}
    found: list[Store] = []

    def ask() -> None:
        for store, scan in scans.items():
            if not scan.changed():
                found.append(store)

    job = alone(ask, name="look at the stores")
    await asyncio.wait({job}, timeout=_AT_ONCE)
    return frozenset(found)
