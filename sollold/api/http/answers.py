"""How many HTTP requests were answered, and how quickly. Pure."""

from __future__ import annotations

from dataclasses import field

from sollold.control.activity import Histogram
from sollold.facts import dataclass

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OWN = ("/api/cluster", "/api/doctor", "/api/ps", "/api/tags", "/api/version", "/metrics", "/web", "/health")
"""Beginnings of routes that dashboards and monitors poll."""


@dataclass(slots=True)
class Answers:
    """Sums since the start.

    Attributes:
        counts: (dialect, route, status) → answers; status 499: the caller hung up.
        seconds: (dialect, kind) → from a request to the end of its response; kind ``poll`` or ``request``.
    """

    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    seconds: dict[tuple[str, str], Histogram] = field(default_factory=dict)

    def add(self, dialect: str, route: str, status: int, seconds: float) -> None:
        """An answer was given."""
        labels = dialect, route, str(status)
        self.counts[labels] = self.counts.get(labels, 0) + 1
        kind = "poll" if route in ("/", "/ready") or route.startswith(_OWN) else "request"
        histogram = self.seconds.get((dialect, kind))
        if histogram is None:
            histogram = self.seconds[dialect, kind] = Histogram(_BUCKETS)
        histogram.observe(seconds)
