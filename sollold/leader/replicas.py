"""Finds models that have had a long queue for a while, so that one more endpoint would pay. Pure.

Scaling down needs no code: an idle replica is unloaded by its keep_alive like any deployment.
"""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.facts import dataclass
from sollold.leader.snapshot import is_loading

LONG = 2
"""Waiting requests per slot, over all endpoints of a model, that make a queue long."""
LEAST = 4
"""Minimum number of waiting requests in a long queue."""
STANDS = 10.0
"""Seconds for which the queue must have been long."""
AGAIN = 60.0
"""Seconds until a model is considered again, whatever the result."""


@dataclass(slots=True)
class _Queue:
    since: float
    next: float = 0.0


class ReplicaPolicy:
    """Watches the queues in the records."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str, bool], _Queue] = {}

    def observe(self, records: Iterable[Record], now: float) -> list[tuple[str, str, bool]]:
        """Return (model, digest, embedding) of each model that should get one more endpoint now."""
        groups: dict[tuple[str, str, bool], list[Endpoint]] = {}
        for record in records:
            for endpoint in record.endpoints:
                # A model that Ollama has not loaded is only an offer, without a queue.
                offer = endpoint.backend is Backend.OLLAMA and not (endpoint.loaded or endpoint.waiting)
                if not offer and endpoint.state is not State.FAILED:
                    groups.setdefault((endpoint.model, endpoint.digest, endpoint.embedding), []).append(
                        endpoint
                    )
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
    if any(is_loading(endpoint) for endpoint in endpoints):
        return False
    waiting = sum(endpoint.waiting for endpoint in endpoints)
    slots = sum(endpoint.slots for endpoint in endpoints)
    return waiting >= max(LEAST, LONG * slots)
