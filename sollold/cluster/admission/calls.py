"""Serves requests about membership in the cluster: strangers' connections and peer calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sollold.cluster.admission.admission import Admission
from sollold.cluster.admission.orders import AdmitOrder, DoorOrder, SecretAnswer, SecretOrder
from sollold.cluster.net.identity import INVITED, JOIN
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import RpcServer


class AdmissionCalls:
    """Connects `Admission` to the peer server.

    Args:
        node: this node's id.
        leader: returns the id of the current leader; empty if there is none.
        name: returns a node's display name by its id.
    """

    def __init__(
        self, admission: Admission, node: str, leader: Callable[[], str], name: Callable[[str], str]
    ) -> None:
        self._name = name
        self._admission = admission
        self._node = node
        self._leader = leader

    def register(self, peers: RpcServer) -> None:
        """Register the protocols for strangers, and the peer methods ``admit``, ``door`` and ``secret``."""
        peers.speak(JOIN, lambda _: self._admission.welcome())
        peers.speak(INVITED, lambda _: self._invited())
        peers.method("admit", AdmitOrder, self._on_admit)
        peers.method("door", DoorOrder, self._on_door)
        peers.method("secret", SecretOrder, self._on_secret)

    def _invited(self) -> asyncio.Protocol | None:
        return None if self._admission.ring.open else self._admission.invitations.accept()

    async def _on_admit(self, caller: str, order: AdmitOrder) -> bool:
        return self._admission.admit(order.node)

    async def _on_door(self, caller: str, order: DoorOrder) -> bool:
        if self._admission.ring.open:
            raise PeerError(self._node, "any machine may join this cluster", transport=False)
        self._admission.open_for(order.seconds)
        return True

    async def _on_secret(self, caller: str, order: SecretOrder) -> SecretAnswer:
        leader = self._leader()
        if caller != leader:
            leads = self._name(leader) if leader else "nobody"
            return SecretAnswer(f"{leads} leads here, not {self._name(caller)}", 0, again=True)
        return await self._admission.obey(order)
