"""A limit on bytes per second, shared by all transfers of a node."""

from __future__ import annotations

import threading

_MIN_BYTES = 1024


class RateLimit:
    """Computes how long to wait before sending or after receiving. Does no I/O; times in seconds.

    Unused capacity accumulates for at most a quarter of a second. Thread-safe.
    """

    def __init__(self, rate: int) -> None:
        """``rate``: bytes per second; 0: no limit. It may be changed at any time."""
        self.rate = rate
        self._busy_until = 0.0
        self._lock = threading.Lock()

    def wait(self, count: int, now: float) -> float:
        """Take ``count`` bytes at the time ``now``; return how long to sleep for them."""
        rate = self.rate
        if not rate:
            return 0.0
        with self._lock:
            self._busy_until = max(self._busy_until, now - 0.25) + count / rate
            return max(0.0, self._busy_until - now)

    def piece(self, most: int) -> int:
        """Return the number of bytes to move at a time, at most ``most``: few enough to keep pauses short."""
        rate = self.rate
        return min(most, max(_MIN_BYTES, rate // 4)) if rate else most
