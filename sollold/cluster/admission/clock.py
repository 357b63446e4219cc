"""Whether the clock was set, as small computers without a battery do once they are on the network."""

from __future__ import annotations

import time

_SET_SECONDS = 30.0
"""A clock that moves by less from one look to the next drifts."""


class ClockWatch:
    """Compares the clock with the time since the machine was started, sleep included."""

    def __init__(self) -> None:
        self._started = _started()

    def moved(self) -> float:
        """Seconds by which the clock was set forward since the last look, negative for back; 0.0: not."""
        before, self._started = self._started, _started()
        moved = self._started - before
        return moved if abs(moved) >= _SET_SECONDS else 0.0


def _started() -> float:
    """When this machine was started, in Unix time by its clock now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
