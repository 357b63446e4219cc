"""The queue of an endpoint: `FairQueue`, which is sans-I/O, and `AdmissionQueue`, in which coroutines wait.

Each endpoint has one queue, at its node, so that the order does not depend on which node got the request. A
request starts at its priority (1 to 10) and rises by one level every `STEP` seconds, without limit: later
requests can overtake it only for a bounded time, so none starves. Within a level the client with the fewest
requests in the engine comes first, then the one served longest ago, then the oldest request. In a full queue
the client with the most requests gives up its last one to a client with fewer.

Requests with which an engine has crashed are tried as described in `sollold.serving.suspects`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from sollold.facts import dataclass
from sollold.serving.protocol import Trial
from sollold.serving.suspects import HOLD_SECONDS, SuspectTrials, Ticket

STEP = 10.0
"""Waiting time that raises a request by one level, in seconds."""
_MIN_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Full:
    """Result of `FairQueue.offer` if full. ``retry_after``: estimated seconds until there is room."""

    retry_after: float


class FairQueue:
    """The queue of one endpoint. Methods take an event and the time, and return the ids admitted by it."""

    def __init__(self, slots: int, limit: int) -> None:
        """``slots``: maximum concurrent requests in the engine; ``limit``: maximum waiting requests."""
        self._slots = max(1, slots)
        self._limit = limit
        self._waiting: dict[str, Ticket] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._client_running: Counter[str] = Counter()
        self._last_served: dict[str, int] = {}
        self._served = 0
        self._service = 0.0
        self._trials = SuspectTrials()

    @property
    def active(self) -> int:
        """Requests running in the engine."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def free(self) -> bool:
        """Whether a new request would be admitted at once."""
        return not self._waiting and len(self._running) < self._slots

    def offer(self, ticket: Ticket, now: float) -> tuple[str, ...] | Full:
        """Add a request. Return the ids admitted now (possibly its own), or `Full`."""
        if len(self._waiting) >= self._limit and len(self._running) >= self._slots:
            return Full(self.retry_after())
        self._waiting[ticket.id] = ticket
        return self._admit(now)

    def displaced_by(self, ticket: Ticket, now: float) -> str | None:
        """The waiting request to refuse instead of ``ticket``, for which the queue is full; None for none.

        It is the last one of the client with the most requests, if that has at least two more than the
        client of ``ticket``, and its level is not higher.
        """
        waiting = Counter(other.client for other in self._waiting.values())
        if not waiting:
            return None
        client, most = waiting.most_common(1)[0]
        level = _level(ticket, now)
        others = [t for t in self._waiting.values() if t.client == client and _level(t, now) <= level]
        if most < waiting[ticket.client] + 2 or not others:
            return None
        return min(others, key=lambda other: (_level(other, now), -other.arrival)).id

    def leave(self, id: str, now: float) -> tuple[str, ...]:
        """Remove a request, done or given up, and return the ids admitted now. Unknown ids are ignored."""
        ticket = self._waiting.pop(id, None)
        if ticket is not None:
            self._forget_client(ticket.client)
            return ()
        entry = self._running.pop(id, None)
        if entry is None:
            return ()
        self._trials.left(id)
        client, started = entry
        seconds = now - started
        self._service = seconds if self._service == 0.0 else 0.8 * self._service + 0.2 * seconds
        self._client_running[client] -= 1
        self._forget_client(client)
        return self._admit(now)

    def answered(self, id: str, now: float) -> tuple[str, ...]:
        """Note that the engine answers a request. Return the ids admitted now."""
        return self._admit(now) if self._trials.answered(id) else ()

    def causes(self) -> list[str]:
        """The waiting requests that must have crashed an engine: see `SuspectTrials.is_cause`."""
        return [id for id, ticket in self._waiting.items() if self._trials.is_cause(ticket)]

    def is_cause(self, ticket: Ticket) -> bool:
        """Whether ``ticket``, which is not in the queue yet, would be one of `causes`."""
        return self._trials.is_cause(ticket)

    def tick(self, now: float) -> tuple[str, ...]:
        """Return the ids admitted because time has passed."""
        return self._admit(now)

    def resize(self, slots: int, now: float) -> tuple[str, ...]:
        """Change the number of slots. Return the ids admitted now."""
        self._slots = max(1, slots)
        return self._admit(now)

    def order(self, now: float) -> list[str]:
        """The waiting ids, next one first."""
        counts: Counter[tuple[int, str]] = Counter()
        keyed = []
        for ticket in sorted(self._waiting.values(), key=lambda ticket: ticket.arrival):
            level = _level(ticket, now)
            nth = counts[level, ticket.client]
            counts[level, ticket.client] += 1
            running, last_served = self._share(ticket.client)
            keyed.append((-level, running + nth, last_served, ticket.arrival, ticket.id))
        keyed.sort()
        return [key[-1] for key in keyed]

    def retry_after(self) -> float:
        """Estimate the seconds until there is room, from the duration of recent requests."""
        wait = (self._service or _MIN_RETRY_SECONDS) * max(1, len(self._waiting)) / self._slots
        return min(max(wait, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def _admit(self, now: float) -> tuple[str, ...]:
        admitted = []
        while self._waiting and len(self._running) < self._slots:
            waiting = self._waiting.values()
            allowed = [ticket for ticket in waiting if self._trials.may_start(ticket, waiting, now)]
            if not allowed:
                break
            ticket = min(allowed, key=lambda t: (-_level(t, now), *self._share(t.client), t.arrival, t.id))
            self._trials.started(ticket)
            del self._waiting[ticket.id]
            self._running[ticket.id] = (ticket.client, now)
            self._client_running[ticket.client] += 1
            self._served += 1
            self._last_served[ticket.client] = self._served
            admitted.append(ticket.id)
        return tuple(admitted)

    def _share(self, client: str) -> tuple[int, int]:
        return self._client_running.get(client, 0), self._last_served.get(client, 0)

    def _forget_client(self, client: str) -> None:
        """Drop the state of a client without requests here, since the number of clients is unbounded."""
        if self._client_running.get(client, 0) <= 0:
            self._client_running.pop(client, None)
            if not any(ticket.client == client for ticket in self._waiting.values()):
                self._last_served.pop(client, None)


def _level(ticket: Ticket, now: float) -> int:
    return ticket.priority + int(max(0.0, now - ticket.arrival) / STEP)


_REPORT_SECONDS = 0.5
"""Interval of reporting positions, in seconds: they change by waiting alone."""


class QueueFull(Exception):
    """The queue is full."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class QueueClosed(Exception):
    """The endpoint admits no more requests."""


class CrashCause(Exception):
    """The request must have crashed an engine: all others that were in it were answered since."""


class AdmissionQueue:
    """The queue of one endpoint, in which coroutines wait."""

    def __init__(self, slots: int, limit: int, changed: Callable[[], None] = lambda: None) -> None:
        """``changed`` is called when the counts `active` and `waiting` may have changed."""
        self._admission = FairQueue(slots, limit)
        self._dismissed = False
        self._waiters: dict[str, tuple[asyncio.Future[None], Callable[[int], None]]] = {}
        self._changed = changed
        self._recount: asyncio.TimerHandle | None = None
        self._reported: dict[str, int] = {}

    @property
    def active(self) -> int:
        """Requests running in the engine."""
        return self._admission.active

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._admission.waiting

    @property
    def free(self) -> bool:
        """Whether a new request would be admitted at once."""
        return not self._dismissed and self._admission.free

    def resize(self, slots: int) -> None:
        """Set the number of slots; after `dismiss` let requests wait again."""
        self._dismissed = False
        self._wake(self._admission.resize(slots, asyncio.get_running_loop().time()))

    async def enter(
        self,
        id: str,
        priority: int,
        client: str,
        age: float,
        on_position: Callable[[int], None],
        *,
        suspect: bool = False,
        trial: Trial | None = None,
    ) -> None:
        """Wait for a slot. `leave` must be called in any case, even after a cancellation.

        ``on_position`` is called with each new position in the queue (1 is next), and with 0 on admission;
        not at all if there is no wait.

        Raises:
            QueueFull: the queue is full, or became so and another client's request takes the place.
            CrashCause: see there.
            QueueClosed: the request would have to wait, and `dismiss` was called before or during the wait.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        ticket = Ticket(id, priority, client, now - age, suspect, trial, now + HOLD_SECONDS)
        if self._admission.is_cause(ticket):
            raise CrashCause
        admitted = self._admission.offer(ticket, now)
        if isinstance(admitted, Full):
            displaced = self._admission.displaced_by(ticket, now)
            if displaced is not None:
                self._turn_away(displaced, QueueFull(admitted.retry_after))
            admitted = self._admission.offer(ticket, now)
        if isinstance(admitted, Full):
            raise QueueFull(admitted.retry_after)
        if id in admitted:
            self._wake(admitted)
            return
        if self._dismissed:
            self._wake(admitted)
            raise QueueClosed
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters[id] = (waiter, on_position)
        self._wake(admitted)
        self._report_positions()
        await waiter
        on_position(0)

    def _turn_away(self, id: str, reason: Exception) -> None:
        """Refuse a waiting request with ``reason``."""
        waiter = self._waiters.get(id)
        if waiter is None or waiter[0].done():
            return
        waiter[0].set_exception(reason)
        # Mark it as retrieved: its waiter may be gone.
        waiter[0].exception()
        self.leave(id)

    def answered(self, id: str) -> None:
        """Note that the engine answers a request."""
        self._wake(self._admission.answered(id, asyncio.get_running_loop().time()))
        for cause in self._admission.causes():
            self._turn_away(cause, CrashCause())

    def leave(self, id: str) -> None:
        """Remove a request that is done or was abandoned by its caller. Unknown ids are ignored."""
        self._waiters.pop(id, None)
        self._reported.pop(id, None)
        self._wake(self._admission.leave(id, asyncio.get_running_loop().time()))

    def dismiss(self) -> None:
        """Turn away waiting requests, now and until `resize`; those in the engine continue."""
        self._dismissed = True
        for future, _ in list(self._waiters.values()):
            if not future.done():
                future.set_exception(QueueClosed())
                # Mark it as retrieved: its waiter may be gone.
                future.exception()
        if self._recount is not None:
            self._recount.cancel()
            self._recount = None

    def _wake(self, admitted: tuple[str, ...]) -> None:
        for id in admitted:
            waiter = self._waiters.pop(id, None)
            if waiter is not None and not waiter[0].done():
                waiter[0].set_result(None)
        self._changed()

    def _report_positions(self) -> None:
        loop = asyncio.get_running_loop()
        for position, id in enumerate(self._admission.order(loop.time()), 1):
            waiter = self._waiters.get(id)
            if waiter is not None and self._reported.get(id) != position:
                self._reported[id] = position
                waiter[1](position)
        if self._recount is None and self._waiters:
            self._recount = loop.call_later(_REPORT_SECONDS, self._report_again)

    def _report_again(self) -> None:
        self._recount = None
        self._wake(self._admission.tick(asyncio.get_running_loop().time()))
        if self._waiters:
            self._report_positions()
