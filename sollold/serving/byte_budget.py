"""The memory that waiting requests take: the bytes of their bodies, up to a limit. Pure."""

from __future__ import annotations


class ByteBudget:
    """A count of bytes. One holder gets half of the limit, so that there is room for others."""

    def __init__(self, limit: int) -> None:
        """``limit``: most bytes; 0: no limit."""
        self._limit = limit
        self._bytes = 0
        self._held: dict[str, int] = {}

    def reserve(self, size: int, own: int = 0, holder: str = "") -> bool:
        """Count ``size`` bytes more, if there is room; ``own``: those counted for the same request already.

        A request that is alone gets in however big it is, and so does the only one of its ``holder`` where
        there is room at all. Empty: nobody's, with no share that could be used up.
        """
        held = self._held.get(holder, 0)
        if self._limit and self._bytes > own and self._bytes + size > self._limit:
            return False
        if self._limit and holder and held > own and held + size > self._limit // 2:
            return False
        self._bytes += size
        if holder:
            self._held[holder] = held + size
        return True

    def release(self, size: int, holder: str = "") -> None:
        """They are no longer held."""
        self._bytes -= size
        left = self._held.pop(holder, 0) - size
        if left > 0:
            self._held[holder] = left
