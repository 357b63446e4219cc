"""Scheduled calls for a state machine that is given its clock."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Timer:
    """A scheduled call."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.args = args

    def cancel(self) -> None:
        """Cancel the call unless it was made."""
        self.call = None


class Timers:
    """Scheduled calls in the order of their times.

    A call that became obsolete may stay and detect that itself. Cancelling it saves a wake-up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> Timer:
        """Schedule ``call(*args, now)`` for when the clock reaches ``when``."""
        self._order += 1
        timer = Timer(call, args)
        heappush(self._heap, (when, self._order, timer))
        return timer

    def next(self) -> float:
        """Return when the first call is due; infinity if there is none."""
        heap = self._heap
        while heap and heap[0][2].call is None:
            heappop(heap)
        return heap[0][0] if heap else float("inf")

    def run(self, now: float) -> None:
        """Make the calls that are due, including those they add."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            timer = heappop(heap)[2]
            if timer.call is not None:
                timer.call(*timer.args, now)

    def shift(self, seconds: float) -> None:
        """Postpone all calls: the process stood still, so no node had a chance to respond."""
        self._heap = [(when + seconds, order, timer) for when, order, timer in self._heap]
