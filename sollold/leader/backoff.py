"""Who failed lately, and for how long that keeps it out. Pure: the time is passed in.

The first failure costs nothing: something is tried again at once. From the second in a row on the pause
doubles. A success forgets all.
"""

from __future__ import annotations

from collections import OrderedDict

from sollold.facts import dataclass

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0
FORGET = 900.0
"""Seconds without a failure after which it counts as the first again."""
MOST = 1024


@dataclass(frozen=True, slots=True)
class Blocked:
    """Left out for ``seconds`` more, after ``failures`` in a row; ``reason``: of the last one, ``since``
    seconds ago."""

    seconds: float
    failures: int
    reason: str
    since: float


@dataclass(slots=True)
class _Story:
    failures: int
    last: float
    reason: str


class Backoff:
    """Keys are the caller's: a node's id, a model's digest.

    Args:
        free: failures in a row that cost nothing.
    """

    def __init__(self, free: int = 1, first: float = FIRST_PAUSE) -> None:
        self._free, self._first = free, first
        self._stories: OrderedDict[str, _Story] = OrderedDict()

    def failed(self, key: str, reason: str, now: float, *, least: int = 1) -> None:
        """It failed once more. ``least``: as how many failures it counts at the least."""
        story = self._stories.pop(key, None)
        failures = story.failures + 1 if story is not None and now - story.last < FORGET else 1
        failures = max(failures, least)
        self._stories[key] = _Story(failures, now, reason)
        while len(self._stories) > MOST:
            self._stories.popitem(last=False)

    def succeeded(self, key: str) -> None:
        """It works: forget what was."""
        self._stories.pop(key, None)

    def known(self, key: str, now: float) -> bool:
        """Whether it has failed lately, and did not succeed since."""
        story = self._stories.get(key)
        return story is not None and now - story.last < FORGET

    def blocked(self, key: str, now: float) -> Blocked | None:
        """Whether it is left out now."""
        story = self._stories.get(key)
        if story is None or story.failures <= self._free:
            return None
        pause = min(self._first * 2 ** min(story.failures - self._free - 1, 30), LONGEST_PAUSE)
        since = now - story.last
        left = pause - since
        return Blocked(left, story.failures, story.reason, since) if left > 0 else None
