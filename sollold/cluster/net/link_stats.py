"""What links to other nodes measure, and when it differs enough to be told. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

_LEAST_TRIP = 250e-6
_LEAST_RATE = 1e6
_RATES = 3
_SHARE = 0.25
"""Smaller differences are noise: every change of a record goes to all nodes."""
_TELL_SECONDS = 15.0
"""Changes of links that are known already are told together, no more often than this."""


class LinkStats:
    """Round trip and rate of the link to each node."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        self._untold = False
        self._told_at = float("-inf")

    def note(self, node: str, trip: float, rate: float, now: float) -> bool:
        """A link's round trip in seconds and its bytes per second; whether to tell now what `told` has.

        A change that waits is told with a later one's measurement: each link is measured again and again.
        """
        before = self._known.get(node)
        first = before is None or (rate > 0.0 and before[1] == 0.0)
        if before is None or _differs(before[0], trip, _LEAST_TRIP) or _differs(before[1], rate, _LEAST_RATE):
            self._known[node] = (trip, rate)
            self._untold = True
        if not self._untold or not (first or now - self._told_at >= _TELL_SECONDS):
            return False
        self._untold = False
        self._told_at = now
        return True

    def keep(self, alive: Collection[str]) -> bool:
        """Forget all nodes but these; whether any was forgotten."""
        gone = self._known.keys() - set(alive)
        for node in gone:
            del self._known[node]
        return bool(gone)

    def told(self) -> tuple[tuple[str, float, float], ...]:
        """(node, round trip, rate) as a record tells them."""
        return tuple((node, round(trip, 6), rate) for node, (trip, rate) in sorted(self._known.items()))


class BestRate:
    """The best of the last few rates: whatever else is under way makes one slower, and nothing faster."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_RATES)

    @property
    def settled(self) -> bool:
        """Whether there are as many as are kept."""
        return len(self._rates) == _RATES

    def add(self, rate: float) -> float:
        """One more was measured; the best, in the same unit."""
        self._rates.append(rate)
        return max(self._rates)


def _differs(before: float, now: float, least: float) -> bool:
    return abs(now - before) > max(least, _SHARE * before)
