"""A limit on the memory held by request bodies, in bytes. Pure."""

from __future__ import annotations


class ByteBudget:
    """Counts reserved bytes. A single holder gets at most half of the limit, to leave room for others."""

    def __init__(self, limit: int) -> None:
        """``limit``: maximum number of bytes; 0: no limit."""
        self._limit = limit
        self._bytes = 0
        self._held: dict[str, int] = {}

    def reserve(self, size: int, own: int = 0, holder: str = "") -> bool:
        """Reserve ``size`` more bytes if there is room. Return whether there was.

        ``own``: bytes already reserved for the same request. A request that is alone is admitted whatever its
        size, and so is the only one of its ``holder`` if it fits the total limit. An empty ``holder`` has no
        share of its own.
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
        """Release ``size`` reserved bytes."""
        self._bytes -= size
        remaining = self._held.pop(holder, 0) - size
        if remaining > 0:
            self._held[holder] = remaining
