"""The door of an endpoint: `Admission` with callers that really wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sollold.serving.admission import Admission, Full, Ticket

_RECOUNT = 0.5
"""Seconds between two looks at the places in line while anybody waits: waiting alone changes them."""


class LineFull(Exception):
    """No room in the line."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the line is full")
        self.retry_after = retry_after


class Closed(Exception):
    """The endpoint takes nobody any more."""


class Gate:
    """One endpoint's door."""

    def __init__(self, slots: int, limit: int, changed: Callable[[], None] = lambda: None) -> None:
        """``changed`` is called whenever the counts of active and waiting have changed."""
        self._admission = Admission(slots, limit)
        self._waiters: dict[str, tuple[asyncio.Future[None], Callable[[int], None]]] = {}
        self._changed = changed
        self._recount: asyncio.TimerHandle | None = None
        self._told: dict[str, int] = {}

    @property
    def active(self) -> int:
        """Requests inside."""
        return self._admission.active

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._admission.waiting

    def resize(self, slots: int) -> None:
        """Let so many in at a time."""
        self._wake(self._admission.resize(slots, asyncio.get_running_loop().time()))

    @asynccontextmanager
    async def turn(
        self, id: str, priority: int, client: str, age: float, on_position: Callable[[int], None]
    ) -> AsyncIterator[None]:
        """Wait for a turn, be inside, leave. Cancelling leaves the line too.

        ``on_position`` is called with the place in line (1 is next), first when it has to wait at all.

        Raises:
            LineFull: there is no room.
            Closed: `close` was called while it waited.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        admitted: asyncio.Future[None] = loop.create_future()
        self._waiters[id] = (admitted, on_position)
        answer = self._admission.offer(Ticket(id, priority, client, now - age), now)
        if isinstance(answer, Full):
            del self._waiters[id]
            raise LineFull(answer.retry_after)
        self._wake(answer)
        try:
            if not admitted.done():
                self._tell()
                await admitted
            yield
        finally:
            self._waiters.pop(id, None)
            self._told.pop(id, None)
            self._wake(self._admission.leave(id, loop.time()))

    def close(self) -> None:
        """Send everybody in line away; those inside go on."""
        for future, _ in list(self._waiters.values()):
            if not future.done():
                future.set_exception(Closed())
                # Nobody may be there to fetch it any more.
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

    def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        for place, id in enumerate(self._admission.order(loop.time()), 1):
            waiter = self._waiters.get(id)
            if waiter is not None and self._told.get(id) != place:
                self._told[id] = place
                waiter[1](place)
        if self._recount is None and self._waiters:
            self._recount = loop.call_later(_RECOUNT, self._tell_again)

    def _tell_again(self) -> None:
        self._recount = None
        if self._waiters:
            self._tell()
