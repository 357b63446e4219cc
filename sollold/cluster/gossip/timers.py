"""What is due when, for a state machine that is given its clock."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Timers:
    """Calls in the order of their times. A call that has become void finds that out itself."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """``call(*args, now)`` once the clock is at ``when``."""
        self._order += 1
        heappush(self._heap, (when, self._order, call, args))

    def next(self) -> float:
        """When the first is due; infinity when there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def run(self, now: float) -> None:
        """Make the calls that are due, with those they add."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, _, call, args = heappop(heap)
            call(*args, now)

    def shift(self, seconds: float) -> None:
        """Move everything later: the process stood still, so nobody had a chance to answer."""
        self._heap = [(when + seconds, order, call, args) for when, order, call, args in self._heap]
