"""Large bodies are sent in pieces, so that others have their turn meanwhile and nothing copies the whole.

aiohttp joins a body to its head, and writes it in one turn: 128 MiB stop a loop for a tenth of a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from io import BytesIO

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

PIECE = 128 * 1024
"""Bytes that are written, or worked on, in one turn."""


def pieces_of(content: memoryview) -> Iterable[memoryview]:
    """``content`` as it may be worked on, a piece in a turn of the loop."""
    return (content[begin : begin + PIECE] for begin in range(0, content.nbytes, PIECE))


async def copied(content: memoryview) -> bytes:
    """A copy; others have their turn meanwhile."""
    # Grows in place, and gives what it holds without another copy.
    whole = BytesIO()
    for piece in pieces_of(content):
        whole.write(piece)
        await asyncio.sleep(0)
    return whole.getvalue()


class InPieces(Payload):
    """The body of a request or of an answer, in one part or in several."""

    def __init__(self, *parts: bytes | bytearray) -> None:
        self._parts = [memoryview(part) for part in parts]
        super().__init__(self._parts)
        self._size = sum(part.nbytes for part in self._parts)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As text."""
        return b"".join(self._parts).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write it all, as quickly as the other side reads."""
        for part in self._parts:
            for piece in pieces_of(part):
                await writer.write(piece)
                # A socket that takes all at once makes nobody wait.
                await asyncio.sleep(0)


def sendable(*parts: bytes | bytearray) -> bytes | InPieces:
    """A body as aiohttp should be given it."""
    return b"".join(parts) if sum(map(len, parts)) <= PIECE else InPieces(*parts)
