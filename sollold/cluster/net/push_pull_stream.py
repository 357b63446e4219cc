"""Push-pull between two nodes on its own TLS connection: framed messages, in turns.

The side that opens the connection sends the first body. An empty message means that there is nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.framing import FrameError, Unframer, frame
from sollold.cluster.net.rpc import PeerError

SYNC = "sollold-sync"
"""ALPN name."""
LARGEST = 16 * 1024 * 1024
"""Maximum bytes of a body."""
_MAX_ROUNDS = 4
_TIMEOUT = 10.0

Take = Callable[[bytes, Address | None], bytes]
"""(received body, its sender's address if known) → response; empty: nothing more."""


class SyncServer(asyncio.Protocol):
    """The responding side of an exchange."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._bytes = Unframer(LARGEST)
        self._rounds = 0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and start the timeout."""
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(_TIMEOUT, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Respond to each complete body."""
        transport = self._transport
        assert transport is not None
        try:
            self._bytes.feed(data)
            while (body := self._bytes.take_message()) is not None:
                self._rounds += 1
                answer = self._take(body, None) if body else b""
                transport.write(frame(answer))
                if not answer or self._rounds >= _MAX_ROUNDS:
                    transport.close()
                    return
        except FrameError:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        if self._timer is not None:
            self._timer.cancel()


class FrameClient(asyncio.Protocol):
    """Sends framed messages and receives one response to each, of at most ``limit`` bytes."""

    def __init__(self, limit: int = LARGEST) -> None:
        self._bytes = Unframer(limit)
        self._waiter: asyncio.Future[bytes] | None = None
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Deliver a complete response."""
        self._bytes.feed(data)
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail a pending exchange."""
        self._lost = True
        self._tell()

    async def exchange(self, body: bytes) -> bytes:
        """Send one message and wait for the response.

        Raises:
            PeerError: the other side closed the connection.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(frame(body))
        self._tell()
        return await self._waiter

    def _tell(self) -> None:
        if self._waiter is None or self._waiter.done():
            return
        try:
            body = self._bytes.take_message()
        except FrameError as error:
            self._waiter.set_exception(PeerError("", str(error), transport=False))
            return
        if body is not None:
            self._waiter.set_result(body)
        elif self._lost:
            self._waiter.set_exception(
                PeerError("", "the connection was closed during the exchange", transport=False)
            )


async def sync(reach: Dialer, node: str, addresses: Sequence[Address], first: bytes, take: Take) -> str:
    """Exchange with ``node`` (empty: any member that is there), starting with the body ``first``.

    Returns:
        The other node.

    Raises:
        PeerError: the node could not be reached, or closed the connection.
        TimeoutError: it took too long.
    """
    async with asyncio.timeout(_TIMEOUT):
        connection, found, address = await reach.connect(
            node, SYNC, FrameClient, timeout=3.0, addresses=addresses
        )
        try:
            body = first
            for _ in range(_MAX_ROUNDS):
                answer = await connection.exchange(body)
                body = take(answer, address) if answer else b""
                if not body:
                    break
        finally:
            connection.transport.abort()
    return found


class _Knock(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


async def check_alive(reach: Dialer, node: str, addresses: Sequence[Address], timeout: float) -> None:
    """Check that ``node`` is alive by a TLS handshake.

    Raises:
        PeerError: it did not respond in time.
    """
    await reach.connect(node, SYNC, _Knock, timeout=timeout, addresses=addresses)
