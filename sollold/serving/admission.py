"""Who is next at an endpoint. Sans-I/O: events and the time go in, the admitted come out.

One line an endpoint, held at the endpoint's node, so that it is one order whichever node was asked. A
request starts at its priority (1 to 10) and rises by one level every `STEP` seconds, without a top: later
ones can pass it only for a bounded time, so nothing starves. Inside a level the client with the fewest
requests in the engine comes first, then the one whose last turn is longest ago, then the oldest request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

STEP = 10.0
"""Seconds of waiting that raise a request by one level."""
_FASTEST_RETRY = 1.0
_SLOWEST_RETRY = 120.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request in line. ``arrival``: on this node's clock; in the past for one that waited elsewhere."""

    id: str
    priority: int
    client: str
    arrival: float


@dataclass(frozen=True, slots=True)
class Full:
    """No room in the line. ``retry_after``: seconds after which there should be some."""

    retry_after: float


class Admission:
    """The line of one endpoint."""

    def __init__(self, slots: int, limit: int) -> None:
        """``slots``: requests in the engine at a time; ``limit``: most that may wait."""
        self._slots = max(1, slots)
        self._limit = limit
        self._waiting: dict[str, Ticket] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._of_client: Counter[str] = Counter()
        self._last_turn: dict[str, int] = {}
        self._turns = 0
        self._service = 0.0

    @property
    def active(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def offer(self, ticket: Ticket, now: float) -> tuple[str, ...] | Full:
        """A request comes. Answers the ids admitted now (it may be among them), or that the line is full."""
        if len(self._waiting) >= self._limit and len(self._running) >= self._slots:
            return Full(self.retry_after())
        self._waiting[ticket.id] = ticket
        return self._admit(now)

    def leave(self, id: str, now: float) -> tuple[str, ...]:
        """A request is done, or its caller hung up. Answers the ids admitted now. Unknown ids are ignored."""
        ticket = self._waiting.pop(id, None)
        if ticket is not None:
            self._forget(ticket.client)
            return ()
        ran = self._running.pop(id, None)
        if ran is None:
            return ()
        client, since = ran
        took = now - since
        self._service = took if self._service == 0.0 else 0.8 * self._service + 0.2 * took
        self._of_client[client] -= 1
        self._forget(client)
        return self._admit(now)

    def resize(self, slots: int, now: float) -> tuple[str, ...]:
        """The endpoint has another number of slots. Answers the ids admitted now."""
        self._slots = max(1, slots)
        return self._admit(now)

    def order(self, now: float) -> list[str]:
        """The line as it stands, the next one first."""
        seen: Counter[tuple[int, str]] = Counter()
        keyed = []
        for ticket in sorted(self._waiting.values(), key=lambda ticket: ticket.arrival):
            level = _level(ticket, now)
            nth = seen[level, ticket.client]
            seen[level, ticket.client] += 1
            running, last_turn = self._share(ticket.client)
            keyed.append((-level, running + nth, last_turn, ticket.arrival, ticket.id))
        keyed.sort()
        return [key[-1] for key in keyed]

    def retry_after(self) -> float:
        """Seconds until there should be room, from how long requests took of late."""
        wait = (self._service or _FASTEST_RETRY) * max(1, len(self._waiting)) / self._slots
        return min(max(wait, _FASTEST_RETRY), _SLOWEST_RETRY)

    def _admit(self, now: float) -> tuple[str, ...]:
        admitted = []
        while self._waiting and len(self._running) < self._slots:
            ticket = min(self._waiting.values(), key=lambda ticket: self._rank(ticket, now))
            del self._waiting[ticket.id]
            self._running[ticket.id] = (ticket.client, now)
            self._of_client[ticket.client] += 1
            self._turns += 1
            self._last_turn[ticket.client] = self._turns
            admitted.append(ticket.id)
        return tuple(admitted)

    def _rank(self, ticket: Ticket, now: float) -> tuple[int, int, int, float, str]:
        return (-_level(ticket, now), *self._share(ticket.client), ticket.arrival, ticket.id)

    def _share(self, client: str) -> tuple[int, int]:
        return self._of_client.get(client, 0), self._last_turn.get(client, 0)

    def _forget(self, client: str) -> None:
        """Keep nothing of a client that has nothing here: clients come without end."""
        if self._of_client.get(client, 0) <= 0:
            self._of_client.pop(client, None)
            if not any(ticket.client == client for ticket in self._waiting.values()):
                self._last_turn.pop(client, None)


def _level(ticket: Ticket, now: float) -> int:
    return ticket.priority + int(max(0.0, now - ticket.arrival) / STEP)
