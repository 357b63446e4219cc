"""Detects that the system clock was set, as it is on small computers without a battery."""

from __future__ import annotations

import time

_SET_SECONDS = 30.0
"""Smaller differences between two checks are drift, in seconds."""


class ClockWatch:
    """Compares the system clock with the time since boot, including sleep."""

    def __init__(self) -> None:
        self._started = _boot_time()

    def moved(self) -> float:
        """Return the seconds by which the clock was set since the last check (negative: back), or 0.0."""
        before, self._started = self._started, _boot_time()
        moved = self._started - before
        return moved if abs(moved) >= _SET_SECONDS else 0.0


def _boot_time() -> float:
    """Return the boot time, in Unix time by the current clock."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
