"""The body of an answer that this node streams over HTTP, written in the moment in which it comes."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from sollold.cluster.net.pieces import PIECE, pieces_of


class BodyWriter:
    """Writes the body of a response.

    aiohttp's own `write` is a coroutine, which only a task can call; the format is the same (RFC 9112, 7.1).
    """

    def __init__(
        self, request: web.Request, response: web.StreamResponse, writer: AbstractStreamWriter
    ) -> None:
        self._protocol = request.protocol
        self._response = response
        self._writer = writer
        self._chunked = request.version >= HttpVersion11
        self._waiting: list[bytes] = []
        """What is too long to be written in one turn of the loop, and what came behind it."""

    @classmethod
    async def begin(cls, request: web.Request, response: web.StreamResponse) -> BodyWriter:
        """Send the headers of ``response``, which has no length."""
        writer = await response.prepare(request)
        assert writer is not None
        return cls(request, response, writer)

    @property
    def unsent(self) -> int:
        """Bytes that the other side has not taken yet."""
        transport = self._protocol.transport
        waiting = sum(map(len, self._waiting))
        return waiting + (transport.get_write_buffer_size() if transport is not None else 0)

    @property
    def gone(self) -> bool:
        """Whether the other side has closed the connection."""
        transport = self._protocol.transport
        return transport is None or transport.is_closing()

    def write(self, data: bytes) -> bool:
        """Send ``data``. Whether the other side takes more; if not, `drain` waits until it does."""
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            return False
        if self._waiting or len(data) > PIECE:
            self._waiting.append(data)
            return False
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return not self._protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the other side has read most of what was sent.

        Raises:
            ConnectionError: it has closed the connection.
        """
        while self._waiting:
            for piece in pieces_of(memoryview(self._waiting[0])):
                await self._writer.write(piece)
                # A socket that takes all at once makes nobody wait.
                await asyncio.sleep(0)
            self._waiting.pop(0)
        if self.gone:
            raise ConnectionResetError("the other side has closed the connection")
        await self._writer.drain()

    async def end(self) -> None:
        """The body is whole."""
        await self._response.write_eof()

    def abort(self) -> None:
        """Close the connection at once."""
        transport = self._protocol.transport
        if transport is not None:
            transport.abort()
