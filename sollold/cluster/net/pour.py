"""Pieces handed on as they arrive, without a task's turn for each.

A *pour* is a coroutine function that takes a receiver. It calls it with each piece that comes, from within
the event loop's own callback where it can, until there are no more (answer True) or the receiver answers
False: "enough for now" (answer False). Then it is called again for the rest. What a receiver raises, the pour
raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

Piece = TypeVar("Piece")

Receiver = Callable[[Piece], bool]
Pour = Callable[[Receiver[Piece]], Awaitable[bool]]


async def pulled(pour: Pour[Piece]) -> AsyncIterator[Piece]:
    """The pieces one by one, each read only when it is asked for."""
    came: list[Piece] = []

    def receive(piece: Piece) -> bool:
        came.append(piece)
        return False

    done = False
    while not done:
        done = await pour(receive)
        for piece in came:
            yield piece
        came.clear()


def pushed(pieces: AsyncIterator[Piece]) -> Pour[Piece]:
    """The other way round: ``pieces`` as a pour."""

    async def pour(receive: Receiver[Piece]) -> bool:
        async for piece in pieces:
            if not receive(piece):
                return False
        return True

    return pour
