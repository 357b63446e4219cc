"""Connects `Admission` to the other parts of a node."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from sollold.cluster.admission.admission import Admission
from sollold.cluster.admission.calls import AdmissionCalls
from sollold.cluster.admission.keyring import Keyring, KeyringFile
from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.connections import NodeConnections
from sollold.cluster.net.gossip_runner import GossipRunner
from sollold.cluster.net.identity import Identity
from sollold.cluster.net.packet_seal import Sealer
from sollold.cluster.net.peer_finder import PeerFinder
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View
from sollold.units import seconds_text

log = logging.getLogger("sollold.cluster")


class NodeAdmission:
    """Applies the keyring to the node's parts, and announces waiting machines in its record.

    Args:
        ring: the cluster's secret, as read from disk.
        state: folder of the keyring file.
        door: seconds after its founding during which the cluster admits any machine that asks.

    Attributes:
        admission: manages the cluster's secret on this node.
    """

    def __init__(
        self,
        view: View,
        identity: Identity,
        ring: Keyring,
        state: Path,
        door: float,
        *,
        connections: NodeConnections,
        finder: PeerFinder,
        runner: GossipRunner,
        sealer: Sealer,
    ) -> None:
        self._view = view
        self._identity = identity
        self._connections = connections
        self._finder = finder
        self._runner = runner
        self._sealer = sealer
        identity.refused |= ring.refused
        sealer.evict(ring.refused)
        self.admission = Admission(
            identity.key,
            view.me.name,
            ring,
            KeyringFile(state),
            door=door,
            reach=connections.reach,
            port=lambda: view.me.peer_port,
            candidates=lambda: finder.strangers(self.admission.ring.known),
            present=lambda: frozenset(record.node for record in view.live()),
            announced=finder.announces,
            apply=self._use_secret,
            moved=self._move,
            met=self._meet,
            changed=self._tell,
        )

    def register(self, peers: RpcServer) -> None:
        """Register the protocols for strangers and the calls of members."""
        name = self._connections.reach.name
        AdmissionCalls(
            self.admission, self._identity.node, lambda: self._view.leader().leader, name
        ).register(peers)

    def start(self) -> None:
        """Announce the state of admission, and start to search for a cluster to join."""
        self._tell()
        if self.admission.ring.alone and (seconds := self.admission.open_seconds):
            duration = seconds_text(seconds)
            log.info("the cluster has one machine so far; others are admitted for %s", duration)
        self._runner.spawn(self.admission.run())

    def note_members(self) -> None:
        """Remember the live nodes as members."""
        self.admission.saw((record.node, record.name) for record in self._view.live())

    def note_token(self, token: bytes) -> None:
        """Note that a member uses ``token``."""
        if token != self._identity.tokens.accepted[0]:
            self.admission.heard(token)

    async def _move(self, node: str, address: Address) -> None:
        """Switch to another cluster, of which ``node`` at ``address`` is a member."""
        # Before anything is awaited: the nodes of the former cluster would be remembered as members of this
        # one, and announced to it.
        self._runner.forget_others()
        try:
            await self._use_secret()
            await self._connections.leave_cluster()
        finally:
            # The secret is used later if that failed.
            self._meet(node, address)

    def _meet(self, node: str, address: Address) -> None:
        """Introduce the member ``node`` at ``address``."""
        self._finder.introduce((address,), node)

    async def _use_secret(self) -> None:
        """Use the keyring for new connections; existing ones stay, except those of evicted nodes.

        If a secret is not accepted any more, only members keep theirs.
        """
        gossip = self._runner.gossip
        assert gossip is not None
        ring, identity = self.admission.ring, self._identity
        refused = ring.refused
        if ring.secured and ring.old:
            # The well-known secret is accepted for a moment longer, but not from nodes without the new one.
            connected = {record.node for record in self._view.live()} | self._connections.callers()
            refused |= connected - ring.known - {identity.node}
        closed = refused
        if not set(identity.tokens.accepted) <= set(ring.tokens.accepted):
            # Somebody who only had the former secret would otherwise keep the rights of a member.
            closed |= self._connections.callers() - ring.known - {identity.node}
        identity.refused.clear()
        identity.refused |= refused
        identity.change_tokens(ring.tokens)
        self._sealer.change_tokens(ring.tokens.accepted)
        self._sealer.evict(refused)
        # Before the links send goodbye: the evicted node notices at once a link that breaks without one.
        self._connections.change_secret({node: gossip.known.addresses(node) for node in closed})
        self._runner.do(gossip.evict(refused, time.monotonic()))
        self._finder.change_clusters(ring.tokens.clusters)
        self._view.update_me(open=ring.open)

    def _tell(self) -> None:
        """Announce in the record which machines wait here, and where this node waits."""
        if self._runner.gossip is None:
            return
        admission = self.admission
        seconds = admission.open_seconds
        # Whole minutes: otherwise the record would change with every call.
        until = (time.time() + seconds) // 60 * 60 + 60 if seconds else 0.0
        self._view.update_me(
            waiting=admission.waiting,
            seeking=admission.search.seeking,
            inviting=admission.invitations.shown,
            admitted_by=admission.ring.admitted_by,
            door_until=until,
        )
