"""A listening socket for HTTPS on which programs of this machine may go on speaking HTTP.

The first byte tells which it is: a TLS handshake begins with 22 (RFC 8446, 5.1), no HTTP request does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from sollold.api.http.client_address import is_loopback

log = logging.getLogger("sollold.http")

BEGIN_SECONDS = 10.0
"""For the first byte, and for the handshake."""
_HANDSHAKE = 22
_PER_ADDRESS = 64
_MOST = 1024
"""Connections that have not finished their handshake: of one other machine, and of all."""
_PAUSE_SECONDS = 0.5
_PLAIN = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_SAY_HTTPS = b'{"error":"this node speaks TLS here: write https:// instead of http://"}\n'


class SecureServer:
    """Takes connections from sockets that listen.

    Args:
        sockets: that listen and do not block; closed with the server.
        make: gives the protocol of a connection.
        context: gives the certificate for the next one.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        make: Callable[[], asyncio.BaseProtocol],
        context: Callable[[], ssl.SSLContext],
    ) -> None:
        self._sockets = sockets
        self._make = make
        self._context = context
        self._beginning: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        for one in sockets:
            self._own(self._accept(one))

    def close(self) -> None:
        """Take no more; connections that have begun stay."""
        for task in self._tasks:
            task.cancel()
        for one in self._sockets:
            one.close()

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("can't accept connections: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            address = str(peer[0]).removeprefix("::ffff:")
            begun = self._beginning.get(address, 0)
            # This machine also reaches itself by its own addresses.
            local = is_loopback(address) or peer[0] == connection.getsockname()[0]
            if (begun >= _PER_ADDRESS and not local) or sum(self._beginning.values()) >= _MOST:
                connection.close()
                continue
            self._beginning[address] = begun + 1
            self._own(self._begin(connection, address, local))

    async def _begin(self, connection: socket.socket, address: str, local: bool) -> None:
        """Until the connection belongs to its protocol, or is closed."""
        loop = asyncio.get_running_loop()
        kept = False
        try:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(BEGIN_SECONDS):
                first = await _first_byte(connection)
            if first == _HANDSHAKE:
                kept = True
                await loop.connect_accepted_socket(
                    self._make, connection, ssl=self._context(), ssl_handshake_timeout=BEGIN_SECONDS
                )
            elif first is not None and local:
                kept = True
                await loop.connect_accepted_socket(self._make, connection)
            elif first is not None:
                await _refuse(connection)
        except (OSError, TimeoutError) as error:
            log.debug("connection from %s closed: %s", address, error)
        finally:
            self._beginning[address] -= 1
            if not self._beginning[address]:
                del self._beginning[address]
            if not kept:
                connection.close()


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
