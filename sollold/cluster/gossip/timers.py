"""What is due when, for a state machine that is given its clock."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Timer:
    """A call that is to be made."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.args = args

    def cancel(self) -> None:
        """Don't make the call, if it is not made yet."""
        self.call = None


class Timers:
    """Calls in the order of their times.

    A call that has become void may stay and find that out itself. To cancel it spares the process a wake-up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> Timer:
        """``call(*args, now)`` once the clock is at ``when``."""
        self._order += 1
        timer = Timer(call, args)
        heappush(self._heap, (when, self._order, timer))
        return timer

    def next(self) -> float:
        """When the first is due; infinity when there is none."""
        heap = self._heap
        while heap and heap[0][2].call is None:
            heappop(heap)
        return heap[0][0] if heap else float("inf")

    def run(self, now: float) -> None:
        """Make the calls that are due, with those they add."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            timer = heappop(heap)[2]
            if timer.call is not None:
                timer.call(*timer.args, now)

    def shift(self, seconds: float) -> None:
        """Move everything later: the process stood still, so nobody had a chance to answer."""
        self._heap = [(when + seconds, order, timer) for when, order, timer in self._heap]
