"""Tracks recent failures, and how long each keeps something from being tried. Pure: the time is passed in.

The first failures (by default one) cause no pause: a retry follows at once. After that, the pause doubles
with each consecutive failure. A success resets everything.
"""

from __future__ import annotations

from collections.abc import Hashable

from sollold.bounded import BoundedDict
from sollold.facts import dataclass

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0
FORGET = 900.0
"""Seconds without a failure after which the next one counts as the first again."""
MOST = 1024


@dataclass(frozen=True, slots=True)
class Blocked:
    """Blocked for ``seconds`` more, after ``failures`` in a row.

    ``reason``: that of the last failure, ``since`` seconds ago.
    """

    seconds: float
    failures: int
    reason: str
    since: float


@dataclass(slots=True)
class _History:
    failures: int
    last: float
    reason: str


class Backoff:
    """Counts failures by a key that the caller chooses: a node's id, a model's digest, both.

    Args:
        free: consecutive failures that cause no pause.
        first: first pause, in seconds.
    """

    def __init__(self, free: int, first: float = FIRST_PAUSE) -> None:
        self._free, self._first = free, first
        self._histories: BoundedDict[Hashable, _History] = BoundedDict(MOST)

    def failed(self, key: Hashable, reason: str, now: float, *, least: int = 1) -> None:
        """Count one more failure, as at least the ``least``-th in a row."""
        history = self._histories.get(key)
        failures = history.failures + 1 if history is not None and now - history.last < FORGET else 1
        failures = max(failures, least)
        self._histories[key] = _History(failures, now, reason)

    def succeeded(self, key: Hashable) -> None:
        """Forget the failures of ``key``: it works."""
        self._histories.pop(key, None)

    def known(self, key: Hashable, now: float, *, least: int = 1) -> bool:
        """Return whether ``key`` has failed recently, ``least`` times in a row, and not succeeded since."""
        history = self._histories.get(key)
        return history is not None and now - history.last < FORGET and history.failures >= least

    def blocked(self, key: Hashable, now: float) -> Blocked | None:
        """Return why and for how long ``key`` is blocked now; None if it is not."""
        history = self._histories.get(key)
        if history is None or history.failures <= self._free:
            return None
        pause = min(self._first * 2 ** min(history.failures - self._free - 1, 30), LONGEST_PAUSE)
        since = now - history.last
        left = pause - since
        return Blocked(left, history.failures, history.reason, since) if left > 0 else None
