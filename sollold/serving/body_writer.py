"""Writes the body of a streamed HTTP response as soon as data arrives, without a task switch."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import HttpVersion11, web
from aiohttp.http import StreamWriter

from sollold.cluster.net.pieces import PIECE, pieces_of


class StreamedResponse(web.StreamResponse):
    """A response of unknown length, whose headers can be sent together with the first bytes of its body."""

    _send_headers_immediately = False


class BodyWriter:
    """Writes the body of a response.

    aiohttp's own `write` is a coroutine, which only a task can call. The format is the same (RFC 9112, 7.1).
    """

    def __init__(self, request: web.Request, response: StreamedResponse, writer: StreamWriter) -> None:
        self._protocol = request.protocol
        self._response = response
        self._writer = writer
        self._chunked = request.version >= HttpVersion11
        self._waiting: list[bytes] = []
        """Data too long to be written in one turn of the loop, and data that follows it."""
        self._held: bytes | None = b""
        """Data to send with the next write, after the headers if unsent; None: nothing is pending."""

    @classmethod
    async def begin(
        cls, request: web.Request, response: StreamedResponse, *, hold: bool = False
    ) -> BodyWriter:
        """Send the headers of ``response`` in the loop's next turn; ``hold``: only with the first bytes."""
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        body = cls(request, response, writer)
        if not hold:
            asyncio.get_running_loop().call_soon(body.flush)
        return body

    def write_soon(self, data: bytes) -> bool:
        """Send ``data``, which is short, with the next write, in the loop's next turn at the latest.

        Returns as `write`.
        """
        if self._waiting:
            self._waiting.append(data)
            return False
        self._held = (self._held or b"") + data
        asyncio.get_running_loop().call_soon(self.flush)
        return not self._protocol.writing_paused

    def flush(self, data: bytes = b"") -> None:
        """If headers or data are held back, send them, followed by ``data``; otherwise do nothing."""
        if self._held is None or self.gone:
            return
        data, self._held = self._held + data, None
        if data:
            # Sends unsent headers too. Without draining the coroutine never waits.
            with contextlib.suppress(StopIteration):
                self._writer.write(data, drain=False).send(None)
        else:
            self._writer.send_headers()

    @property
    def unsent(self) -> int:
        """Bytes not yet written to the socket."""
        transport = self._protocol.transport
        waiting = sum(map(len, self._waiting))
        return waiting + (transport.get_write_buffer_size() if transport is not None else 0)

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""
        transport = self._protocol.transport
        return transport is None or transport.is_closing()

    def write(self, data: bytes) -> bool:
        """Send ``data``. Return whether the peer accepts more; if not, await `drain` first."""
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
        """Wait until the peer has read most of the data.

        Raises:
            ConnectionError: the connection is closed.
        """
        self.flush()
        while self._waiting:
            for piece in pieces_of(memoryview(self._waiting[0])):
                await self._writer.write(piece)
                # Let others run: write() does not wait while the socket accepts everything.
                await asyncio.sleep(0)
            self._waiting.pop(0)
        if self.gone:
            raise ConnectionResetError("the other side has closed the connection")
        await self._writer.drain()

    async def write_eof(self, last: bytes = b"") -> None:
        """Send ``last`` and complete the body.

        Raises:
            ConnectionError: the connection is closed.
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
