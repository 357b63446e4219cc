"""A limit on bytes per second, shared by all transfers of a node."""

from __future__ import annotations


class Pace:
    """Tells how long to wait before sending or after receiving. Sans-I/O; times in seconds.

    What was not used is not saved up for longer than a quarter of a second.
    """

    def __init__(self, rate: int) -> None:
        """``rate``: bytes per second; 0: no limit. It may be changed at any time."""
        self.rate = rate
        self._at = 0.0

    def wait(self, count: int, now: float) -> float:
        """Take ``count`` bytes at the time ``now``; the answer is how long to sleep for them."""
        if not self.rate:
            return 0.0
        self._at = max(self._at, now - 0.25) + count / self.rate
        return max(0.0, self._at - now)
