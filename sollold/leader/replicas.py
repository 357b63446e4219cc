"""Which models have had a long queue for a while, so that one more endpoint would pay. Pure.

The way back needs nothing: a replica that is idle is unloaded by its keep_alive like any deployment.
"""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.facts import dataclass
from sollold.leader.snapshot import is_loading

LONG = 2
"""Requests waiting for each place, over all endpoints of a model, that make a queue long."""
LEAST = 4
STANDS = 10.0
"""Seconds that it must have been long."""
AGAIN = 60.0
"""Seconds until a model is thought of again, whatever came of it."""


@dataclass(slots=True)
class _Queue:
    since: float
    next: float = 0.0


class ReplicaPolicy:
    """Watches the queues in the records."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str, bool], _Queue] = {}

    def observe(self, records: Iterable[Record], now: float) -> list[tuple[str, str, bool]]:
        """(model, digest, embedding) for each model that should get one more endpoint now."""
        groups: dict[tuple[str, str, bool], list[Endpoint]] = {}
        for record in records:
            for one in record.endpoints:
                # What an Ollama has not loaded is only an offer: it has no queue.
                offer = one.backend is Backend.OLLAMA and not (one.loaded or one.waiting)
                if not offer and one.state is not State.FAILED:
                    groups.setdefault((one.model, one.digest, one.embedding), []).append(one)
        long = {key for key, endpoints in groups.items() if _is_long(endpoints)}
        for key in list(self._queues):
            if key not in groups or (key not in long and now >= self._queues[key].next):
                del self._queues[key]
            elif key not in long:
                self._queues[key].since = now
        wanted = []
        for key in sorted(long):
            queue = self._queues.setdefault(key, _Queue(now))
            if now - queue.since >= STANDS and now >= queue.next:
                queue.next = now + AGAIN
                wanted.append(key)
        return wanted


def _is_long(endpoints: list[Endpoint]) -> bool:
    if any(is_loading(one) for one in endpoints):
        return False
    waiting = sum(one.waiting for one in endpoints)
    places = sum(one.slots for one in endpoints)
    return waiting >= max(LEAST, LONG * places)
