"""Decides when requests with which an engine crashed may be tried in another one. Pure.

Several requests were without an answer when an engine crashed, and one of them is the cause. They are tried
again one at a time. The likeliest cause, the one sent last, is tried after the others: if they are all
answered, it must be the cause, and is refused without another crash. If another one is the cause, it crashes
a second engine, which proves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from sollold.serving.protocol import Trial

HOLD_SECONDS = 2.0
"""Seconds for which the likeliest cause waits for the others to arrive: they may come from other nodes."""
_MAX_CLEARED = 256


class Ticket(msgspec.Struct, frozen=True):
    """A queued request. ``arrival``: on this node's clock, minus the time that it waited elsewhere.

    ``suspect``, ``trial``: as in `sollold.serving.protocol.EngineRequest`; ``held_until``: the time until
    which the likeliest cause waits for the other suspects.
    """

    id: str
    priority: int
    client: str
    arrival: float
    suspect: bool = False
    trial: Trial | None = None
    held_until: float = 0.0


class SuspectTrials:
    """The trials of suspects in one engine."""

    def __init__(self) -> None:
        self._unanswered: Ticket | None = None
        """The suspect in the engine that is not answered yet."""
        self._cleared: deque[str] = deque(maxlen=_MAX_CLEARED)
        """`Trial.id` of suspects that were answered here."""

    def may_start(self, ticket: Ticket, waiting: Iterable[Ticket], now: float) -> bool:
        """Whether the request may go into the engine now; ``waiting``: the queue."""
        if not ticket.suspect:
            return True
        if self._unanswered or self.is_cause(ticket):
            return False
        if ticket.trial is None or not ticket.trial.after:
            return True
        after = ticket.trial.after
        others_wait = any(other.trial is not None and other.trial.id in after for other in waiting)
        return now >= ticket.held_until and not others_wait

    def is_cause(self, ticket: Ticket) -> bool:
        """Whether all other suspects were answered, so that this one must be the cause of the crash."""
        after = ticket.trial.after if ticket.trial is not None else ()
        return bool(after) and all(id in self._cleared for id in after)

    def started(self, ticket: Ticket) -> None:
        """Note that the request is in the engine."""
        if ticket.suspect:
            self._unanswered = ticket

    def answered(self, id: str) -> bool:
        """Note that the engine answers a suspect. Return whether other suspects may start now."""
        if self._unanswered is None or id != self._unanswered.id:
            return False
        if self._unanswered.trial is not None:
            self._cleared.append(self._unanswered.trial.id)
        self._unanswered = None
        return True

    def left(self, id: str) -> None:
        """Note that a request has left the engine."""
        if self._unanswered is not None and id == self._unanswered.id:
            self._unanswered = None
