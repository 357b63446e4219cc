"""The head's connections to a worker's node, up to its yes.

While it loads, llama-server connects to a worker some five times, each time after it has closed the last
connection. A handshake takes 3 to 40 ms while machines copy tensors, and each would have to wait for its own:
so the next connection is made before it is asked for.
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

_OPEN_SECONDS = 8.0
_AHEAD_SECONDS = 3.0
"""So long the next connection waits to be used, less than the owner waits for its greeting."""


class TunnelDialer:
    """One tunnel's connections to ``node``.

    Args:
        greeting: names the worker.
    """

    def __init__(self, reach: Dialer, node: str, greeting: Open) -> None:
        self._reach = reach
        self._node = node
        self._greeting = greeting
        self._next: asyncio.Task[TunnelClient] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self) -> None:
        """Make the next connection, unless there is one."""
        if self._next is None or _is_lost(self._next):
            self._next = asyncio.get_running_loop().create_task(self._ahead())
            self._next.add_done_callback(_is_lost)

    def drop(self) -> None:
        """End what was prepared."""
        prepared, self._next = self._next, None
        if prepared is not None:
            prepared.cancel()
            if not _is_lost(prepared) and prepared.done():
                prepared.result().transport.abort()

    async def open(self) -> TunnelClient:
        """A connection to the worker, which its node has agreed to.

        Raises:
            PeerError: there is none to be had.
        """
        client = await self._prepared() or await self._dial()
        try:
            client.transport.write(frame(msgspec.msgpack.encode(self._greeting)))
            async with asyncio.timeout(_OPEN_SECONDS):
                opened = await client.answer
        except TimeoutError:
            client.transport.abort()
            raise PeerError(self._node, "it was not opened there in time", transport=True) from None
        except BaseException:
            client.transport.abort()
            raise
        if not opened.ok:
            client.transport.abort()
            raise PeerError(self._node, f"it was refused: {opened.reason}", transport=True)
        return client

    async def _prepared(self) -> TunnelClient | None:
        """The prepared connection, once it is made; None when it failed: a new one tells why."""
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

    async def _ahead(self) -> TunnelClient:
        client = await self._dial()
        self._timer = asyncio.get_running_loop().call_later(_AHEAD_SECONDS, client.transport.abort)
        return client

    async def _dial(self) -> TunnelClient:
        found = await self._reach.connect(self._node, TUNNEL, TunnelClient, timeout=_OPEN_SECONDS / 2)
        return found[0]


def _is_lost(dialled: asyncio.Task[TunnelClient]) -> bool:
    """Whether the connection was not made, or is closed already."""
    if not dialled.done():
        return False
    return dialled.cancelled() or dialled.exception() is not None or dialled.result().answer.done()


class TunnelClient(asyncio.Protocol):
    """The connection to the worker's node until it has answered."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._bytes = Unframer(GREETING_LIMIT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        self._bytes.feed(data)
        if self.answer.done():
            return
        try:
            answer = self._bytes.take_message()
            if answer is not None:
                self.transport.pause_reading()
                self.answer.set_result(msgspec.msgpack.decode(answer, type=Opened))
        except (FrameError, msgspec.DecodeError) as error:
            self.answer.set_exception(PeerError("", f"invalid answer: {error}", transport=True))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if not self.answer.done():
            self.answer.set_exception(
                PeerError("", f"the connection was closed: {exc or 'no reason given'}", transport=True)
            )
            self.answer.exception()  # nobody may wait for it yet

    def rest(self) -> bytes:
        """What came behind the answer: the worker's bytes."""
        return self._bytes.rest()
