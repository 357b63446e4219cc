"""All that is open between this node and others, cut where nothing good can come by it any more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.rpc_server import Peers
from sollold.cluster.net.standing_link import StandingLinks

log = logging.getLogger("sollold.cluster")


class NodeConnections:
    """The calls of this node, those that it answers, and the links.

    Attributes:
        reach: opened what this node opened.
    """

    def __init__(self, reach: Dialer, calls: Calls, peers: Peers, links: StandingLinks) -> None:
        self.reach = reach
        self._calls = calls
        self._peers = peers
        self._links = links

    def drop_node(self, node: str, *, now: int = 0) -> None:
        """``node`` is dead, or its process is ``now`` another one."""
        self._links.drop_node(node, now=now)
        self._peers.drop_node(node)
        self._calls.drop_node(node)

    def drop_own_hosts(self, hosts: Collection[str]) -> None:
        """This machine no longer has the addresses ``hosts``."""
        self._links.drop_hosts(own=hosts)
        cut = self.reach.sockets.cut_hosts(own=hosts) + self._peers.sockets.cut_hosts(own=hosts)
        if cut:
            log.info("lost the address %s: closed its %d connections", ", ".join(sorted(hosts)), cut)

    def drop_hosts_of(self, name: str, hosts: Collection[str]) -> None:
        """The node called ``name`` no longer has the addresses ``hosts``."""
        self._links.drop_hosts(other=hosts)
        cut = self.reach.sockets.cut_hosts(other=hosts) + self._peers.sockets.cut_hosts(other=hosts)
        if cut:
            lost = ", ".join(sorted(hosts))
            log.info("node %s lost the address %s: closed %d connections with it", name, lost, cut)

    def callers(self) -> frozenset[str]:
        """The nodes that have a connection to this one."""
        return self._peers.callers()

    def change_secret(self, evicted: Mapping[str, Collection[Address]]) -> None:
        """Make new ones by the secret that holds now; those of evicted nodes (id → addresses) are cut."""
        self.reach.forget_contexts()
        for node, addresses in evicted.items():
            self._peers.cut(node)
            self.reach.sockets.cut_peers(addresses)
        self._peers.change_identity()

    async def leave_cluster(self) -> None:
        """End the links and the calls: they are with nodes of a cluster that this one has left."""
        for node in self._links.up():
            self._links.drop_node(node)
        await self._calls.close()
