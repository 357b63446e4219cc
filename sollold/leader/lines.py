"""Which models have had a long line for a while, so that one more endpoint would pay. Pure.

The way back needs nothing: a replica that is idle is unloaded by its keep_alive like any deployment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sollold.cluster.record import Backend, Endpoint, Record, State
from sollold.leader.world import is_loading

LONG = 2
"""Requests waiting for each place, over all endpoints of a model, that make a line long."""
LEAST = 4
STANDS = 10.0
"""Seconds that it must have been long."""
AGAIN = 60.0
"""Seconds until a model is thought of again, whatever came of it."""


@dataclass(slots=True)
class _Line:
    since: float
    next: float = 0.0


class Lines:
    """Watches the lines in the records."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, bool], _Line] = {}

    def observe(self, records: Iterable[Record], now: float) -> list[tuple[str, str, bool]]:
        """(model, digest, embedding) for each model that should get one more endpoint now."""
        groups: dict[tuple[str, str, bool], list[Endpoint]] = {}
        for record in records:
            for one in record.endpoints:
                # What an Ollama has not loaded is only an offer: it has no place where anybody stands.
                offer = one.backend is Backend.OLLAMA and not (one.loaded or one.waiting)
                if not offer and one.state is not State.FAILED:
                    groups.setdefault((one.model, one.digest, one.embedding), []).append(one)
        long = {key for key, endpoints in groups.items() if _is_long(endpoints)}
        for key in list(self._lines):
            if key not in groups or (key not in long and now >= self._lines[key].next):
                del self._lines[key]
            elif key not in long:
                self._lines[key].since = now
        wanted = []
        for key in sorted(long):
            line = self._lines.setdefault(key, _Line(now))
            if now - line.since >= STANDS and now >= line.next:
                line.next = now + AGAIN
                wanted.append(key)
        return wanted


def _is_long(endpoints: list[Endpoint]) -> bool:
    if any(is_loading(one) for one in endpoints):
        return False
    waiting = sum(one.waiting for one in endpoints)
    places = sum(one.slots for one in endpoints)
    return waiting >= max(LEAST, LONG * places)
