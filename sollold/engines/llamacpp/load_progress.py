"""How far a load is, and whether it stands still."""

from __future__ import annotations

import time

from sollold.models.model import Model

LOAD_STALL_SECONDS = 60.0
"""A load without progress for so long stands still, on a worker that hangs, say; see `stall_seconds`."""
FIRST_WORD_SECONDS = 60.0
"""Before its first word llama-server only starts, which takes 10 ms, and meets its devices, some seconds for
GPUs: it reads nothing of the model yet. If its processes do nothing at all for so long, it hangs."""
FIRST_WORD_ON_DISK_SECONDS = 180.0
"""Where it waits for a disk: its program may lie on one that wakes up, or on a share."""
_PAUSED_SECONDS = 5.0
"""Between two looks, of which there is one a second, from which this daemon itself did not run."""


class LoadProgress:
    """Of one load, as llama-server tells it.

    Attributes:
        value: how much is done, 0.0 to 1.0.
    """

    def __init__(self, model: Model) -> None:
        self.value = 0.0
        self._model = model
        self._told = False
        self._since = self._looked = time.monotonic()
        self._work: int | None = None

    def advance(self, value: float) -> bool:
        """A word of llama-server; whether it is news."""
        if value <= self.value and self._told:
            return False
        self._told = True
        self.value = value
        self._since = time.monotonic()
        return True

    @property
    def begun(self) -> bool:
        """Whether llama-server has said anything."""
        return self._told

    def stalled(self, work: int | None, waits_for_disk: bool) -> float:
        """Seconds for which it has stood still; 0.0: it gets on. To be asked once a second.

        ``work``: a number that grows with what its processes do. Before the first word of llama-server it is
        all that tells a load that hangs from a slow one; None: it can't be told.
        """
        now = time.monotonic()
        paused, self._looked = now - self._looked, now
        if paused > _PAUSED_SECONDS:
            # Stopped with its engines, or busy with other things: what they do takes no less time for it.
            self._since += paused
        if self._told:
            limit = stall_seconds(self._model, self.value)
        elif work is None or work != self._work:
            self._work, self._since = work, now
            return 0.0
        else:
            limit = FIRST_WORD_ON_DISK_SECONDS if waits_for_disk else FIRST_WORD_SECONDS
        still = now - self._since
        return still if still > limit else 0.0


def stall_seconds(model: Model, progress: float) -> float:
    """Seconds until the next word of progress, which comes with each tensor, at the worst: the largest over
    a link of 5 MB/s. After the last tensor come the allocation of state and a first token.
    """
    slowest = model.size / max(model.layers, 1) / 5e6
    return (LOAD_STALL_SECONDS + slowest) * (3 if progress >= 1.0 else 1)
