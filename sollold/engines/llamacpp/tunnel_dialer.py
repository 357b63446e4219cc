"""Opens the head's connections to a worker's node.

During a load llama-server connects to a worker about five times, each time after closing the previous
connection. A handshake takes 3 to 40 ms while machines copy tensors, so the next connection is made in
advance.
"""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.framing import FrameError, Unframer, frame
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import TUNNEL
from sollold.cluster.net.tunnel_server import GREETING_LIMIT, Open, Opened
from sollold.undecodable import UNDECODABLE

_OPEN_SECONDS = 8.0
_PREPARED_SECONDS = 3.0
"""How long a prepared connection is kept, in seconds: less than its owner waits for the greeting."""


class TunnelDialer:
    """Connections of one tunnel to ``node``.

    Args:
        greeting: identifies the worker.
    """

    def __init__(self, reach: Dialer, node: str, greeting: Open) -> None:
        self._reach = reach
        self._node = node
        self._greeting = greeting
        self._next: asyncio.Task[TunnelClient] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self) -> None:
        """Prepare the next connection, unless there is one."""
        if self._next is None or _is_lost(self._next):
            self._next = asyncio.get_running_loop().create_task(self._dial_ahead())
            self._next.add_done_callback(_is_lost)

    def drop(self) -> None:
        """Close the prepared connection."""
        prepared, self._next = self._next, None
        if prepared is not None:
            prepared.cancel()
            if not _is_lost(prepared) and prepared.done():
                prepared.result().transport.abort()

    async def open(self) -> TunnelClient:
        """Return a connection to the worker that its node has accepted.

        Raises:
            PeerError: the connection failed or was refused.
        """
        client = await self._prepared() or await self._dial()
        try:
            client.transport.write(frame(msgspec.msgpack.encode(self._greeting)))
            async with asyncio.timeout(_OPEN_SECONDS):
                opened = await client.answer
        except TimeoutError:
            client.transport.abort()
            raise PeerError(self._node, "it timed out while opening", transport=True) from None
        except BaseException:
            client.transport.abort()
            raise
        if not opened.ok:
            client.transport.abort()
            raise PeerError(self._node, f"it was refused: {opened.reason}", transport=True)
        return client

    async def _prepared(self) -> TunnelClient | None:
        """Return the prepared connection once established; None if it failed: a new attempt tells why."""
        prepared, self._next = self._next, None
        if prepared is None or _is_lost(prepared):
            return None
        try:
            client = await prepared
        except PeerError:
            return None
        if self._timer is not None:
            self._timer.cancel()
        return client

    async def _dial_ahead(self) -> TunnelClient:
        client = await self._dial()
        self._timer = asyncio.get_running_loop().call_later(_PREPARED_SECONDS, client.transport.abort)
        return client

    async def _dial(self) -> TunnelClient:
        found = await self._reach.connect(self._node, TUNNEL, TunnelClient, timeout=_OPEN_SECONDS / 2)
        return found[0]


def _is_lost(dialled: asyncio.Task[TunnelClient]) -> bool:
    """Return whether the connection failed or has been closed."""
    if not dialled.done():
        return False
    return dialled.cancelled() or dialled.exception() is not None or dialled.result().answer.done()


class TunnelClient(asyncio.Protocol):
    """The connection to the worker's node until it has replied."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._bytes = Unframer(GREETING_LIMIT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Collect bytes until the reply is complete."""
        self._bytes.feed(data)
        if self.answer.done():
            return
        try:
            answer = self._bytes.take_message()
            if answer is not None:
                self.transport.pause_reading()
                self.answer.set_result(msgspec.msgpack.decode(answer, type=Opened))
        except (FrameError, *UNDECODABLE) as error:
            self.answer.set_exception(PeerError("", f"invalid answer: {error}", transport=True))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail if there is no reply yet."""
        if not self.answer.done():
            self.answer.set_exception(
                PeerError("", f"the connection was closed: {exc or 'no reason given'}", transport=True)
            )
            self.answer.exception()  # nobody may wait for it yet

    def rest(self) -> bytes:
        """Return the bytes after the reply, which come from the worker."""
        return self._bytes.rest()
