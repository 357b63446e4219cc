"""Measurements of links to other nodes, and when they differ enough to be announced. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

_MIN_TRIP = 250e-6
_MIN_RATE = 1e6
_MAX_TRIP = 3600.0
_MAX_RATE = 1e15
"""Limits in seconds and bytes per second. A peer that reports other values must not make this node publish a
record that all others reject."""
_RATES = 3
_SHARE = 0.25
"""Relative differences up to this are noise: every change of a record is sent to all nodes."""
_TELL_SECONDS = 15.0
"""Minimum seconds between announcements of changes of known links, which are batched."""


class LinkStats:
    """Round trip and rate of the link to each node."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        self._unannounced = False
        self._announced_at = float("-inf")

    def note(self, node: str, trip: float, rate: float, now: float) -> bool:
        """Note round trip in seconds and rate in bytes per second. Returns whether to announce `told` now.

        Impossible values are ignored. A pending change is announced with a later measurement: each link is
        measured again and again.
        """
        if not (0.0 < trip <= _MAX_TRIP and 0.0 <= rate <= _MAX_RATE):
            return False
        before = self._known.get(node)
        first = before is None or (rate > 0.0 and before[1] == 0.0)
        if before is None or _differs(before[0], trip, _MIN_TRIP) or _differs(before[1], rate, _MIN_RATE):
            self._known[node] = (trip, rate)
            self._unannounced = True
        if not self._unannounced or not (first or now - self._announced_at >= _TELL_SECONDS):
            return False
        self._unannounced = False
        self._announced_at = now
        return True

    def keep(self, alive: Collection[str]) -> bool:
        """Forget all nodes but these. Returns whether any was forgotten."""
        gone = self._known.keys() - set(alive)
        for node in gone:
            del self._known[node]
        return bool(gone)

    def told(self) -> tuple[tuple[str, float, float], ...]:
        """Return (node, round trip, rate) of each link, for the record."""
        return tuple((node, round(trip, 6), rate) for node, (trip, rate) in sorted(self._known.items()))


class BestRate:
    """The best of the last few rates: other traffic makes a measurement slower, nothing makes it faster."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_RATES)

    @property
    def settled(self) -> bool:
        """Whether there are enough measurements."""
        return len(self._rates) == _RATES

    def add(self, rate: float) -> float:
        """Add a measured rate and return the best."""
        self._rates.append(rate)
        return max(self._rates)


def _differs(before: float, now: float, minimum: float) -> bool:
    return abs(now - before) > max(minimum, _SHARE * before)
