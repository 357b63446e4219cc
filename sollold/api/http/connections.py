"""Limits callers' connections: their number, the time for the first header and without reading an answer, and
the bytes read at once.

Otherwise thousands of connections that send a header byte by byte would take all file descriptors, including
those for other nodes and for engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable
from typing import cast

from sollold.cluster.net.acceptor import is_loopback

log = logging.getLogger("sollold.api")

_HEADER_SECONDS = 10.0
_UNREAD_SECONDS = 600.0
"""Seconds without the client reading anything of an answer, which takes memory until it is read."""
LONGEST_HEADER = 64 * 1024
"""Maximum bytes of a header line: browsers send all cookies of ``localhost`` to each of its ports."""
_MAX_HEAD_BYTES = 4 * LONGEST_HEADER
PER_ADDRESS = 512
"""Maximum connections from one other machine."""
_MAX_ADDRESSES = 1024
_MAX_DESCRIPTORS = 65536
PIECE = 16 * 1024
"""Maximum bytes that are read from a connection at once."""
_RESERVED = 2048
"""Descriptors reserved for other nodes, engines and files."""
_LINE_BREAKS = b"\r\n"
_HANDSHAKE = 22
"""First byte of a TLS handshake (RFC 8446, 5.1), but of no HTTP request."""
_HTTP_ONLY = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: 78\r\n\r\n"
    b'{"error":"this node speaks only HTTP here: write http:// instead of https://"}'
)
_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as the system allows, up to a maximum; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
    return soft


def connection_limit() -> int:
    """Return the maximum number of callers' connections; nodes, engines and files need descriptors too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(soft // 2, soft - _RESERVED)


class Connections:
    """The open connections, by address.

    Args:
        limit: maximum number of all connections.
        per_address: maximum number from one other machine; those from this machine have no such limit.
    """

    def __init__(self, limit: int, per_address: int = PER_ADDRESS) -> None:
        self._limit = limit
        self._per_address = per_address
        self._open: dict[str, list[asyncio.Transport]] = {}

    def admits(self, transport: asyncio.Transport) -> bool:
        """Return whether ``transport`` may stay; if so, it counts until it is closed."""
        name = transport.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) else ""
        known = [entry for entry in self._open.get(address, ()) if not entry.is_closing()]
        if len(known) >= self._per_address and not is_loopback(address.removeprefix("::ffff:")):
            return False
        if sum(map(len, self._open.values())) >= self._limit or len(self._open) >= _MAX_ADDRESSES:
            self._forget_closed()
            if sum(map(len, self._open.values())) >= self._limit:
                return False
            known = [entry for entry in known if not entry.is_closing()]
        self._open[address] = [*known, transport]
        return True

    def abort_all(self) -> None:
        """Abort all connections that are still open."""
        for transports in self._open.values():
            for transport in transports:
                transport.abort()
        self._open = {}

    def _forget_closed(self) -> None:
        live = {
            address: [transport for transport in transports if not transport.is_closing()]
            for address, transports in self._open.items()
        }
        self._open = {address: transports for address, transports in live.items() if transports}


class ClientConnection(asyncio.BufferedProtocol):
    """A caller's connection. Once its first header is complete, ``make``'s protocol receives everything.

    That protocol gets at most `PIECE` bytes in one turn of the loop: the 256 KiB that the loop itself would
    read, in chunks of one byte each, would keep it busy for too long.
    """

    _BUFFER = memoryview(bytearray(PIECE))
    """Shared by all connections: what is read into it is copied before anything else is read."""

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        connections: Connections,
    ) -> None:
        self._make = make
        self._connections = connections
        self._head = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        """Of the first header, later of unread data."""
        self._transport: asyncio.Transport | None = None
        self._protocol: asyncio.Protocol | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept or abort the connection."""
        transport = cast(asyncio.Transport, transport)
        if not self._connections.admits(transport):
            transport.abort()
            return
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(_HEADER_SECONDS, self._refuse, _TIMED_OUT)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the transport."""
        return self._BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on the received bytes, or collect them until the header is complete."""
        data = bytes(self._BUFFER[:nbytes])
        if self._protocol is not None:
            self._protocol.data_received(data)
        elif self._transport is not None:
            self._collect(data)

    def eof_received(self) -> bool | None:
        """The peer sends no more."""
        return self._protocol.eof_received() if self._protocol is not None else None

    def pause_writing(self) -> None:
        """The peer reads slowly."""
        self._watch_unread(-1)
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._stop_timer()
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        self._transport = None
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(exc)

    def _watch_unread(self, unsent: int) -> None:
        """Abort the connection if the peer has read nothing since ``unsent`` bytes were left to send."""
        if self._transport is None:
            return
        remaining = self._transport.get_write_buffer_size()
        if remaining == unsent:
            log.info("closing a connection whose client does not read its answer")
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_UNREAD_SECONDS, self._watch_unread, remaining)

    def _collect(self, data: bytes) -> None:
        # The end of the header may have begun in earlier bytes.
        start = max(0, len(self._head) - 3)
        self._head += data
        if self._head[0] in _LINE_BREAKS:
            # They are ignored before a request (RFC 9112, 2.2), so they end no header.
            self._head, start = self._head.lstrip(_LINE_BREAKS), 0
            if not self._head:
                return
        if self._head[0] == _HANDSHAKE:
            # The end of a header would never arrive.
            self._refuse(_HTTP_ONLY)
            return
        if self._head.find(b"\r\n\r\n", start) < 0 and self._head.find(b"\n\n", start) < 0:
            if len(self._head) > _MAX_HEAD_BYTES:
                self._refuse(_TOO_LONG)
            return
        self._stop_timer()
        assert self._transport is not None
        self._protocol = self._make()
        self._protocol.connection_made(self._transport)
        data, self._head = bytes(self._head), bytearray()
        self._protocol.data_received(data)

    def _refuse(self, answer: bytes) -> None:
        self._stop_timer()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.write(answer)
            transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
