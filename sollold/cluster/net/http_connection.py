"""Minimal HTTP/1.1 client connections: kept alive, and response bodies are passed on as they arrive.

For token streams: aiohttp's client needs a task switch and some twenty calls per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from sollold.cluster.net.pieces import PIECE, pieces_of
from sollold.cluster.net.pour import Receiver
from sollold.cluster.net.response_parser import BadResponse, ResponseParser

_MAX_UNREAD = 256 * 1024
"""Buffered bytes without a receiver above which reading pauses."""


class ResponseLost(ConnectionError):
    """The connection broke before the response was complete, or the response is not valid HTTP."""


class HttpConnection(asyncio.Protocol):
    """One connection and its current response. Call `ask`, then `pour` until it returns True."""

    def __init__(self, name: str, prefix: str = "") -> None:
        """``name``: the server's name in the ``Host`` header; ``prefix``: prefix of every path."""
        self._name = name
        self._prefix = prefix
        self.on_close: Callable[[], None] = lambda: None
        self.silence = 0.0
        """Seconds without a byte, while waiting for one, after which the response is lost; 0: no limit."""
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._parser.done = True
        self._sending = False
        """Whether a request has been sent in part only."""
        self._receive: Receiver[bytes] | None = None
        self._waiter: asyncio.Future[bool] | None = None
        """Set while the caller waits for the response head or its end."""
        self._unread: list[bytes] = []
        self._size = 0
        self._paused = False
        self._error: ResponseLost | None = None

    @property
    def reusable(self) -> bool:
        """Whether the response was read completely and another request may follow."""
        complete = self._parser.done and not self._unread and not self._sending
        return complete and self._parser.keep and self._error is None

    async def ask(self, method: str, path: str, headers: Mapping[str, str], *body: bytes | bytearray) -> int:
        """Send a request; its body may have several parts. Returns the status of the response.

        Raises:
            ResponseLost: the connection broke.
        """
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._name}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        size = sum(map(len, body))
        lines.append(f"Content-Length: {size}\r\n\r\n")
        self._parser.begin()
        if self._transport is None or self._error is not None:
            raise self._error or ResponseLost("the connection is closed")
        head = "\r\n".join(lines).encode("latin-1")
        if size <= PIECE:
            # In one write: each wakes the other side, and is a TLS record.
            self._transport.write(b"".join((head, *body)))
        else:
            self._sending = True
            self._transport.write(head)
            for part in body:
                await self._write_in_pieces(part)
            self._sending = False
        # The server may have refused the request before it was complete.
        if not self._parser.status:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._parser.status

    async def _write_in_pieces(self, part: bytes | bytearray) -> None:
        for piece in pieces_of(memoryview(part)):
            if self._transport is None or self._error is not None:
                raise self._error or ResponseLost("the other side closed the connection")
            self._transport.write(piece)
            # Let other tasks run.
            await asyncio.sleep(0)

    async def pour(self, receive: Receiver[bytes]) -> bool:
        """Pass on the body, as described in `sollold.cluster.net.pour`.

        Raises:
            ResponseLost: the connection broke.
        """
        while self._unread:
            piece = self._unread.pop(0)
            self._size -= len(piece)
            if not receive(piece):
                return False
        if self._paused:
            # Even after a complete response: another may follow on this connection.
            self._resume()
        if self._parser.done:
            return True
        if self._error is not None:
            raise self._error
        self._receive = receive
        try:
            return await self._wait()
        finally:
            self._receive = None

    def _resume(self) -> None:
        """Resume reading: nothing is buffered."""
        if self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    async def _wait(self) -> bool:
        self._waiter = self._loop.create_future()
        self._heard = self._loop.time()
        if self.silence:
            self._timer = self._loop.call_later(self.silence, self._check_silence)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()

    def _check_silence(self) -> None:
        """Check for silence; a single timer is re-armed instead of reset for each byte."""
        if self._waiter is None or self._transport is None:
            return
        now = self._loop.time()
        if self._transport.get_write_buffer_size():
            # The request is still being sent.
            self._heard = now
        left = self._heard + self.silence - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
            return
        self._lose(ResponseLost(f"no data for {self.silence:g} s"))
        self.close()

    def close(self) -> None:
        """Close the connection at once, which ends a running generation."""
        self._lose(ResponseLost("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Pass on received parts of the body."""
        parser = self._parser
        if parser.done:
            self.close()
            return
        status = parser.status
        if self.silence:
            self._heard = self._loop.time()
        try:
            body = parser.feed(data)
        except BadResponse as error:
            self._lose(ResponseLost(f"invalid HTTP: {error}"))
            self.close()
            return
        if body:
            self._deliver(body)
        if parser.status != status or (parser.done and self._receive is not None):
            self._wake(True)

    def _deliver(self, body: bytes) -> None:
        receive = self._receive
        if receive is None:
            self._unread.append(body)
            self._size += len(body)
            if self._size > _MAX_UNREAD and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
            return
        try:
            if receive(body):
                return
        except Exception as error:
            self._receive = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
            return
        self._receive = None
        self._wake(False)

    def eof_received(self) -> None:
        """End the response if it extends to the end of the connection."""
        if self._parser.feed_eof():
            self._wake(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail an incomplete response."""
        self._transport = None
        if not self._parser.feed_eof():
            self._lose(ResponseLost(str(exc) if exc else "the other side closed the connection"))
        self._error = self._error or ResponseLost("the other side closed the connection")
        self._wake(True)
        self.on_close()

    def _lose(self, error: ResponseLost) -> None:
        self._error = self._error or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._error)

    def _wake(self, done: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(done)


class KeptConnections:
    """A pool of connections by destination, both in use and idle.

    Args:
        idle: seconds for which an idle connection is kept.
    """

    def __init__(self, idle: float) -> None:
        self._idle = idle
        self._kept: dict[Hashable, dict[HttpConnection, float]] = {}
        self._open: dict[HttpConnection, Hashable] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, key: Hashable, connection: HttpConnection) -> None:
        """Track a new connection until it closes."""
        self._open[connection] = key
        connection.on_close = lambda: self._forget(connection)

    def take_idle(self, key: Hashable) -> HttpConnection | None:
        """Take an idle connection for the next request to ``key``; None if there is none."""
        self.close_idle()
        kept = self._kept.get(key)
        if not kept:
            return None
        found, _ = kept.popitem()
        if not kept:
            del self._kept[key]
        return found

    def release(self, connection: HttpConnection) -> None:
        """Return a connection whose response is no longer needed: it is kept for reuse, or closed."""
        key = self._open.get(connection)
        if key is None or not connection.reusable:
            connection.close()
            return
        self._kept.setdefault(key, {})[connection] = asyncio.get_running_loop().time()

    def close_idle(self) -> None:
        """Close connections that have been idle for too long."""
        oldest = asyncio.get_running_loop().time() - self._idle
        for kept in tuple(self._kept.values()):
            while kept:
                # They are in the order in which they were last used.
                connection, since = next(iter(kept.items()))
                if since >= oldest:
                    break
                self._forget(connection)
                connection.close()

    def close(self, matches: Callable[[Any], bool] = lambda _: True) -> None:
        """Close all connections, or those whose key satisfies ``matches``."""
        for connection, key in tuple(self._open.items()):
            if matches(key):
                connection.close()

    def _forget(self, connection: HttpConnection) -> None:
        key = self._open.pop(connection, None)
        kept = self._kept.get(key)
        if kept is not None:
            kept.pop(connection, None)
            if not kept:
                del self._kept[key]
