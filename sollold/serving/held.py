"""The memory that waiting requests take: the bytes of their bodies, up to a limit. Pure."""

from __future__ import annotations


class Held:
    """A count of bytes."""

    def __init__(self, limit: int) -> None:
        """``limit``: most bytes; 0: no limit."""
        self._limit = limit
        self._bytes = 0

    def take(self, size: int, own: int = 0) -> bool:
        """Hold ``size`` bytes more, if there is room; ``own``: those held for the same request already.

        What is alone is let in however big it is.
        """
        if self._limit and self._bytes > own and self._bytes + size > self._limit:
            return False
        self._bytes += size
        return True

    def give_back(self, size: int) -> None:
        """They are gone."""
        self._bytes -= size
