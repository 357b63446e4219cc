"""Progress of a load, and stall detection."""

from __future__ import annotations

import time

from sollold.models.model import Model

LOAD_SECONDS = 3600.0
"""Maximum duration of a load, in seconds, besides the time for its data; see `max_load_seconds`."""
_MIN_RATE = 5e6
"""Bytes per second of the slowest disk or network on which a load is given enough time."""
LOAD_STALL_SECONDS = 60.0
"""A load without progress for this long has stalled, on a hung worker for example; see `stall_seconds`."""
FIRST_WORD_SECONDS = 60.0
"""Timeout before its first report: until then llama-server only starts, which takes 10 ms, and initializes
its devices, some seconds for GPUs. If its processes do nothing at all for this long, it hangs."""
FIRST_WORD_ON_DISK_SECONDS = 180.0
"""The same while it waits for a disk: its program may be on a sleeping disk or a network share."""
_PAUSED_SECONDS = 5.0
"""Gap between two checks, normally a second, from which this daemon itself was not running."""


class LoadProgress:
    """Progress of one load, as llama-server reports it.

    Attributes:
        value: fraction done, 0.0 to 1.0.
    """

    def __init__(self, model: Model) -> None:
        self.value = 0.0
        self._model = model
        self._reported = False
        self._since = self._checked = time.monotonic()
        self._work: int | None = None

    def advance(self, value: float) -> bool:
        """Process a progress report; return whether it is new."""
        if value <= self.value and self._reported:
            return False
        self._reported = True
        self.value = value
        self._since = time.monotonic()
        return True

    @property
    def begun(self) -> bool:
        """Whether llama-server has reported anything."""
        return self._reported

    def stalled(self, work: int | None, waits_for_disk: bool) -> float:
        """Return for how many seconds the load has stalled; 0.0 if it has not. Call it once a second.

        ``work``: a counter of its processes' activity. Before llama-server's first report, only this tells a
        hung load from a slow one; None: unknown.
        """
        now = time.monotonic()
        paused, self._checked = now - self._checked, now
        if paused > _PAUSED_SECONDS:
            # Suspended together with its engines, or overloaded: they need their full time on top of that.
            self._since += paused
        if self._reported:
            limit = stall_seconds(self._model, self.value)
        elif work is None or work != self._work:
            self._work, self._since = work, now
            return 0.0
        else:
            limit = FIRST_WORD_ON_DISK_SECONDS if waits_for_disk else FIRST_WORD_SECONDS
        idle = now - self._since
        return idle if idle > limit else 0.0


def max_load_seconds(model: Model) -> float:
    """Return the seconds after which a load that still makes progress is given up."""
    return LOAD_SECONDS + model.size / _MIN_RATE


def stall_seconds(model: Model, progress: float) -> float:
    """Return the worst-case seconds until the next progress report, of which there is one per tensor: the
    largest over a link of 5 MB/s. After the last tensor, state is allocated and a first token computed.
    """
    slowest = model.size / max(model.layers, 1) / _MIN_RATE
    return (LOAD_STALL_SECONDS + slowest) * (3 if progress >= 1.0 else 1)
