"""Passing on pieces as they arrive, without a task switch for each.

A *pour* is a coroutine function that takes a receiver. It calls the receiver with each arriving piece, if
possible from within the event loop's own callback, until there are no more (then it returns True) or the
receiver returns False: "enough for now" (then it returns False and is called again for the rest). An
exception of the receiver propagates to the caller of the pour.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

Piece = TypeVar("Piece")

Receiver = Callable[[Piece], bool]
Pour = Callable[[Receiver[Piece]], Awaitable[bool]]


async def pulled(pour: Pour[Piece]) -> AsyncIterator[Piece]:
    """Yield the pieces one by one, each read only on demand."""
    pieces: list[Piece] = []

    def receive(piece: Piece) -> bool:
        pieces.append(piece)
        return False

    done = False
    while not done:
        done = await pour(receive)
        for piece in pieces:
            yield piece
        pieces.clear()


def pushed(pieces: AsyncIterator[Piece]) -> Pour[Piece]:
    """Return the iterator ``pieces`` as a pour."""

    async def pour(receive: Receiver[Piece]) -> bool:
        async for piece in pieces:
            if not receive(piece):
                return False
        return True

    return pour
