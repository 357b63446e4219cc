"""Sends large bodies in pieces, so that other tasks run in between and nothing copies the whole body.

aiohttp joins a body to its head and writes it in one turn: 128 MiB block a loop for a tenth of a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from io import BytesIO

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

PIECE = 128 * 1024
"""Bytes written or processed in one turn of the loop."""


def pieces_of(content: memoryview) -> Iterable[memoryview]:
    """Return ``content`` in pieces, each to be processed in one turn of the loop."""
    return (content[start : start + PIECE] for start in range(0, content.nbytes, PIECE))


async def copied(content: memoryview) -> bytes:
    """Return a copy; other tasks run in between."""
    # Grows in place, and returns its content without another copy.
    whole = BytesIO()
    for piece in pieces_of(content):
        whole.write(piece)
        await asyncio.sleep(0)
    return whole.getvalue()


class InPieces(Payload):
    """A request or response body of one or several parts."""

    def __init__(self, *parts: bytes | bytearray) -> None:
        self._parts = [memoryview(part) for part in parts]
        super().__init__(self._parts)
        self._size = sum(part.nbytes for part in self._parts)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the decoded text."""
        return b"".join(self._parts).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write everything, as fast as the other side reads."""
        for part in self._parts:
            for piece in pieces_of(part):
                await writer.write(piece)
                # `write` does not wait if the socket accepts everything at once.
                await asyncio.sleep(0)


def sendable(*parts: bytes | bytearray) -> bytes | InPieces:
    """Return a body in the form to pass to aiohttp."""
    return b"".join(parts) if sum(map(len, parts)) <= PIECE else InPieces(*parts)
