"""An answer whose beginning was read to see what it is."""

from __future__ import annotations

from collections.abc import AsyncIterator


async def joined(begun: list[list[bytes]], rest: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    """What was read, and what follows it."""
    for batch in begun:
        yield batch
    async for batch in rest:
        yield batch
