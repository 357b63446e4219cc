"""How far a load is, and whether it stands still."""

from __future__ import annotations

import time

from sollold.models.model import Model

LOAD_STALL_SECONDS = 60.0
"""A load without progress for so long stands still, on a worker that hangs, say; see `stall_seconds`."""


class LoadProgress:
    """Of one load, as llama-server tells it.

    Attributes:
        value: how much is done, 0.0 to 1.0.
    """

    def __init__(self, model: Model) -> None:
        self.value = 0.0
        self._model = model
        self._told = False
        self._since = time.monotonic()

    def advance(self, value: float) -> bool:
        """A word of llama-server; whether it is news."""
        if value <= self.value and self._told:
            return False
        self._told = True
        self.value = value
        self._since = time.monotonic()
        return True

    def stalled(self) -> float:
        """Seconds for which it has stood still; 0.0: it gets on. Without any word it can't be told from a
        slow one.
        """
        still = time.monotonic() - self._since
        return still if self._told and still > stall_seconds(self._model, self.value) else 0.0


def stall_seconds(model: Model, progress: float) -> float:
    """Seconds until the next word of progress, which comes with each tensor, at the worst: the largest over
    a link of 5 MB/s. After the last tensor come the allocation of state and a first token.
    """
    slowest = model.size / max(model.layers, 1) / 5e6
    return (LOAD_STALL_SECONDS + slowest) * (3 if progress >= 1.0 else 1)
