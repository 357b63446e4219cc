"""A listening socket for HTTPS on which programs of this machine may go on speaking HTTP.

The first byte tells which it is: a TLS handshake begins with 22 (RFC 8446, 5.1), no HTTP request does.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from sollold.cluster.net.acceptor import Acceptor, Encryption

BEGIN_SECONDS = 10.0
"""For the first byte, and for the handshake."""
_HANDSHAKE = 22
_PLAIN = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_SAY_HTTPS = b'{"error":"this node speaks TLS here: write https:// instead of http://"}\n'


def secure_server(
    sockets: list[socket.socket],
    make: Callable[[], asyncio.BaseProtocol],
    context: Callable[[], ssl.SSLContext],
) -> Acceptor:
    """Serves ``make``'s protocols on sockets that listen.

    ``context`` gives the certificate for the next connection.
    """

    async def choose(connection: socket.socket, local: bool) -> Encryption | None:
        async with asyncio.timeout(BEGIN_SECONDS):
            first = await _first_byte(connection)
        if first == _HANDSHAKE:
            return Encryption(context())
        if first is not None and local:
            return Encryption(None)
        if first is not None:
            await _refuse(connection)
        return None

    return Acceptor(sockets, make, choose, handshake=BEGIN_SECONDS)


async def _first_byte(connection: socket.socket) -> int | None:
    """The first byte, left where it is; None when the other side has nothing to say."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def come() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), come)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())
    seen = connection.recv(1, socket.MSG_PEEK)
    return seen[0] if seen else None


async def _refuse(connection: socket.socket) -> None:
    """Say in HTTP that it is TLS that is wanted."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(BEGIN_SECONDS):
        await loop.sock_recv(connection, 1 << 16)
        await loop.sock_sendall(connection, _PLAIN % (len(_SAY_HTTPS), _SAY_HTTPS))
        connection.shutdown(socket.SHUT_WR)
        # What is unread when it is closed would make a reset of it, and the answer would be lost.
        while await loop.sock_recv(connection, 1 << 16):
            continue
