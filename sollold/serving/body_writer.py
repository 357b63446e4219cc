"""The body of an answer that this node streams over HTTP, written in the moment in which it comes."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import HttpVersion11, web
from aiohttp.http import StreamWriter

from sollold.cluster.net.pieces import PIECE, pieces_of


class StreamedResponse(web.StreamResponse):
    """A response of no known length, whose headers can leave together with the first bytes of its body."""

    _send_headers_immediately = False


class BodyWriter:
    """Writes the body of a response.

    aiohttp's own `write` is a coroutine, which only a task can call; the format is the same (RFC 9112, 7.1).
    """

    def __init__(self, request: web.Request, response: StreamedResponse, writer: StreamWriter) -> None:
        self._protocol = request.protocol
        self._response = response
        self._writer = writer
        self._chunked = request.version >= HttpVersion11
        self._waiting: list[bytes] = []
        """What is too long to be written in one turn of the loop, and what came behind it."""
        self._held: bytes | None = b""
        """What leaves with the next bytes, behind the headers while those are unsent; None: nothing."""

    @classmethod
    async def begin(
        cls, request: web.Request, response: StreamedResponse, *, hold: bool = False
    ) -> BodyWriter:
        """Send the headers of ``response`` in this turn of the loop; ``hold``: only with the first bytes."""
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        made = cls(request, response, writer)
        if not hold:
            asyncio.get_running_loop().call_soon(made.flush)
        return made

    def write_soon(self, data: bytes) -> None:
        """Send ``data`` with what is written next, in the loop's next turn at the latest."""
        if self._waiting:
            self._waiting.append(data)
        else:
            self._held = (self._held or b"") + data
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self, data: bytes = b"") -> None:
        """Send what is held, and ``data`` with it."""
        if self._held is None or self.gone:
            return
        data, self._held = self._held + data, None
        if data:
            # With the headers, if they are unsent. It waits for nothing, since it is not to drain.
            with contextlib.suppress(StopIteration):
                self._writer.write(data, drain=False).send(None)
        else:
            self._writer.send_headers()

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
            if self._held is None:
                transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
            else:
                self.flush(data)
        return not self._protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the other side has read most of what was sent.

        Raises:
            ConnectionError: it has closed the connection.
        """
        self.flush()
        while self._waiting:
            for piece in pieces_of(memoryview(self._waiting[0])):
                await self._writer.write(piece)
                # A socket that takes all at once makes nobody wait.
                await asyncio.sleep(0)
            self._waiting.pop(0)
        if self.gone:
            raise ConnectionResetError("the other side has closed the connection")
        await self._writer.drain()

    async def write_eof(self, last: bytes = b"") -> None:
        """The body is whole with ``last``.

        Raises:
            ConnectionError: the other side has closed the connection.
        """
        if self._waiting or len(last) > PIECE:
            self.write(last)
            await self.drain()
            last = b""
        if self.gone:
            raise ConnectionResetError("the other side has closed the connection")
        last, self._held = (self._held or b"") + last, None
        await self._response.write_eof(last)

    def abort(self) -> None:
        """Close the connection at once."""
        transport = self._protocol.transport
        if transport is not None:
            transport.abort()
