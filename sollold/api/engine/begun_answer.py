"""An answer whose beginning was read to see what it is: given from there on, or ended."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sollold.serving.request import Answer


async def joined(begun: list[list[bytes]], rest: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    """What was read, and what follows it."""
    for batch in begun:
        yield batch
    async for batch in rest:
        yield batch


async def closed(answer: Answer) -> None:
    """End it: another is asked for in its place."""
    closing = answer.close()
    if closing is not None:
        await closing
