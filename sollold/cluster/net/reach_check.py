"""Checks whether live nodes can also connect to each other: a firewall may pass only some of the traffic.

Datagrams, and connections opened by the other side, show that a node is alive. Calls to it, and layers for
its workers, need connections to it.
"""

from __future__ import annotations

import asyncio

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import HTTP, RpcServer
from sollold.cluster.net.view import View
from sollold.facts import dataclass

_CONNECT_SECONDS = 2.5
_CALL_SECONDS = 4.0
_PADDING = bytes(32 * 1024)
"""Fills several packets of full size: only those are lost if an MTU is wrong."""


@dataclass(frozen=True, slots=True)
class ReachRequest:
    """Asks the receiver whether it can connect to the sender."""

    padding: bytes = b""


@dataclass(frozen=True, slots=True)
class Reached:
    """The response. ``why``: why it can't connect; empty: it can."""

    why: str = ""
    padding: bytes = b""


@dataclass(frozen=True, slots=True)
class Unreached:
    """Connecting to ``node``, which is alive, fails; ``inward``: it can't connect to this node.

    ``large``: connecting works, but large packets seem to get lost.
    """

    node: str
    why: str
    inward: bool = False
    large: bool = False


class ReachCheck:
    """Tries connections between this node and all others, in both directions."""

    def __init__(self, view: View, reach: Dialer, calls: RpcClient) -> None:
        self._view = view
        self._reach = reach
        self._calls = calls
        self._checking = asyncio.Lock()
        self._requested = self._covered = 0
        """Number of requests for a check, and of those that the last result covers."""
        self._found: tuple[Unreached, ...] = ()

    def register(self, peers: RpcServer) -> None:
        """Register the peer method ``reach``."""
        peers.method("reach", ReachRequest, self._answer)

    async def check(self) -> tuple[Unreached, ...]:
        """Return failing connections; takes seconds if there are any.

        One check runs at a time, and all who waited for it share the next one: each opens two connections per
        node, and anybody on the LAN may request any number.
        """
        self._requested += 1
        number = self._requested
        async with self._checking:
            if self._covered < number:
                latest = self._requested
                self._found = await self._check_all()
                self._covered = latest
            return self._found

    async def _check_all(self) -> tuple[Unreached, ...]:
        me = self._view.me.node
        others = [record.node for record in self._view.live() if record.node != me]
        found = await asyncio.gather(*(self._check(node) for node in others))
        return tuple(failure for failure in found if failure is not None)

    async def _check(self, node: str) -> Unreached | None:
        if why := await self._why_not(node):
            return Unreached(node, why)
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                request = ReachRequest(_PADDING)
                answer = await self._calls.call(node, "reach", request, Reached, timeout=2 * _CALL_SECONDS)
        except TimeoutError:
            return Unreached(node, "", large=True)
        except PeerError:
            return None  # a release that does not know the call, or a node that just went
        return Unreached(node, answer.why, inward=True) if answer.why else None

    async def _answer(self, caller: str, request: ReachRequest) -> Reached:
        return Reached(await self._why_not(caller), request.padding)

    async def _why_not(self, node: str) -> str:
        """Return why no new connection to ``node`` can be made; empty if one can."""
        try:
            connection, _, _ = await self._reach.connect(node, HTTP, _Opened, timeout=_CONNECT_SECONDS)
        except PeerError as error:
            return str(error)
        connection.transport.close()
        return ""


class _Opened(asyncio.Protocol):
    transport: asyncio.BaseTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
