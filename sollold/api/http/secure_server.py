"""A listener for HTTPS and HTTP; the settings may require HTTPS of other machines.

The first byte distinguishes them: a TLS handshake begins with 22 (RFC 8446, 5.1), no HTTP request does.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

from sollold.api.http.connections import PER_ADDRESS, connection_limit
from sollold.cluster.net.acceptor import Acceptor, Encryption

BEGIN_SECONDS = 10.0
"""Timeout of the first byte, and of the handshake, in seconds."""
_HANDSHAKE = 22
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_HTTPS_REQUIRED = b'{"error":"this node speaks TLS here: write https:// instead of http://"}\n'


def secure_server(
    sockets: list[socket.socket],
    make: Callable[[], asyncio.BaseProtocol],
    context: Callable[[], Awaitable[ssl.SSLContext]],
    *,
    required: bool,
) -> Acceptor:
    """Serve ``make``'s protocols on listening sockets.

    Args:
        context: returns the TLS context for the next connection.
        required: only programs on this machine may use HTTP.
    """

    async def choose(connection: socket.socket, local: bool) -> Encryption | None:
        async with asyncio.timeout(BEGIN_SECONDS):
            first = await _first_byte(connection)
        if first == _HANDSHAKE:
            return Encryption(await context())
        if first is not None and (local or not required):
            return Encryption(None)
        if first is not None:
            await _refuse(connection)
        return None

    # Before their first byte, connections have the same limits as later.
    total = connection_limit()
    return Acceptor(sockets, make, choose, handshake=BEGIN_SECONDS, per_address=PER_ADDRESS, total=total)


async def _first_byte(connection: socket.socket) -> int | None:
    """Return the first byte without consuming it; None if the peer sends nothing more."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())
    data = connection.recv(1, socket.MSG_PEEK)
    return data[0] if data else None


async def _refuse(connection: socket.socket) -> None:
    """Reply in HTTP that TLS is required."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(BEGIN_SECONDS):
        await loop.sock_recv(connection, 1 << 16)
        await loop.sock_sendall(connection, _BAD_REQUEST % (len(_HTTPS_REQUIRED), _HTTPS_REQUIRED))
        connection.shutdown(socket.SHUT_WR)
        # Closing with unread bytes would reset the connection, and the response would be lost.
        while await loop.sock_recv(connection, 1 << 16):
            continue
