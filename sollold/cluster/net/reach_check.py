"""Whether nodes that are alive can also connect to each other: a firewall may let only some of it through.

Datagrams, and connections that the other side opened, show that a node is alive. Calls to it, and layers on
their way to its workers, need connections to it.
"""

from __future__ import annotations

import asyncio

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.rpc_server import HTTP, Peers
from sollold.cluster.net.view import View
from sollold.facts import dataclass

_CONNECT_SECONDS = 2.5
_CALL_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class ReachRequest:
    """Asks whether the node that is asked can connect to the one that asks."""


@dataclass(frozen=True, slots=True)
class Reached:
    """The answer. ``why``: why it can't; empty: it can."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Unreached:
    """``node``, which is alive, can't be connected to; ``inward``: it can't connect to this node."""

    node: str
    why: str
    inward: bool = False


class ReachCheck:
    """Tries connections between this node and all others, in both directions."""

    def __init__(self, view: View, reach: Dialer, calls: Calls) -> None:
        self._view = view
        self._reach = reach
        self._calls = calls

    def register(self, peers: Peers) -> None:
        """Answer the peer method ``reach``."""
        peers.method("reach", ReachRequest, self._answer)

    async def check(self) -> tuple[Unreached, ...]:
        """What can't be connected to; takes seconds where something can't."""
        me = self._view.me.node
        others = [one.node for one in self._view.live() if one.node != me]
        found = await asyncio.gather(*(self._check(node) for node in others))
        return tuple(one for one in found if one is not None)

    async def _check(self, node: str) -> Unreached | None:
        if why := await self._why_not(node):
            return Unreached(node, why)
        try:
            answer = await self._calls.call(node, "reach", ReachRequest(), Reached, timeout=_CALL_SECONDS)
        except PeerError:
            return None  # a release that does not know the call, or a node that just went
        return Unreached(node, answer.why, inward=True) if answer.why else None

    async def _answer(self, caller: str, request: ReachRequest) -> Reached:
        return Reached(await self._why_not(caller))

    async def _why_not(self, node: str) -> str:
        """Why no new connection can be made to ``node``; empty when one can."""
        try:
            made, _, _ = await self._reach.connect(node, HTTP, _Opened, timeout=_CONNECT_SECONDS)
        except PeerError as error:
            return str(error)
        made.transport.close()
        return ""


class _Opened(asyncio.Protocol):
    transport: asyncio.BaseTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
