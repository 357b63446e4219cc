"""The memory that waiting requests take: the bytes of their bodies, up to a limit. Pure."""

from __future__ import annotations


class ByteBudget:
    """A count of bytes."""

    def __init__(self, limit: int) -> None:
        """``limit``: most bytes; 0: no limit."""
        self._limit = limit
        self._bytes = 0

    def reserve(self, size: int, own: int = 0) -> bool:
        """Count ``size`` bytes more, if there is room; ``own``: those counted for the same request already.

        A request that is alone gets in however big it is.
        """
        if self._limit and self._bytes > own and self._bytes + size > self._limit:
            return False
        self._bytes += size
        return True

    def release(self, size: int) -> None:
        """They are no longer held."""
        self._bytes -= size
