"""Limits the memory of large answers until they are sent: a client may read slowly, on many connections."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from aiohttp.abc import AbstractStreamWriter

from sollold.cluster.net.pieces import PIECE, InPieces
from sollold.serving.byte_budget import ByteBudget


class AnswerBudget:
    """Counts the bytes of large answers that are being sent.

    Args:
        limit: maximum number of bytes, of which one client gets half; 0: no limit.
    """

    def __init__(self, limit: int) -> None:
        self._budget = ByteBudget(limit)

    def counted(self, body: bytes | bytearray, holder: str) -> bytes | bytearray | InPieces | None:
        """Return ``body`` in the form to pass to aiohttp; None if there is no room for it.

        ``holder``: the client, as in `ByteBudget.reserve`. Bodies that are sent in one piece are not counted.
        """
        size = len(body)
        if size <= PIECE:
            return body
        if not self._budget.reserve(size, holder=holder):
            return None
        return _Counted(body, lambda: self._budget.release(size, holder))


class _Counted(InPieces):
    """A body that calls ``release`` when it was sent, was given up, or was never sent and is deleted."""

    def __init__(self, body: bytes | bytearray, release: Callable[[], None]) -> None:
        super().__init__(body)
        self._release = weakref.finalize(self, release)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write everything, as fast as the other side reads."""
        try:
            await super().write(writer)
        finally:
            self._release()
