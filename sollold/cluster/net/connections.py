"""All connections between this node and others, closed where they have become useless."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.standing_link import StandingLinks

log = logging.getLogger("sollold.cluster")


class NodeConnections:
    """The outgoing calls, incoming connections and links of this node.

    Attributes:
        reach: opens this node's outgoing connections.
    """

    def __init__(self, reach: Dialer, calls: RpcClient, peers: RpcServer, links: StandingLinks) -> None:
        self.reach = reach
        self._calls = calls
        self._peers = peers
        self._links = links

    def drop_node(self, node: str, *, boot: int = 0) -> None:
        """Close connections with ``node``, which is dead or has a new process with boot number ``boot``."""
        self._links.drop_node(node, boot=boot)
        self._peers.drop_node(node)
        self._calls.drop_node(node)

    def drop_own_hosts(self, hosts: Collection[str]) -> None:
        """Close connections using the addresses ``hosts``, which this machine no longer has."""
        self._links.drop_hosts(own=hosts)
        cut = self.reach.sockets.cut_hosts(own=hosts) + self._peers.sockets.cut_hosts(own=hosts)
        if cut:
            log.info("lost the address %s: closed its %d connections", ", ".join(sorted(hosts)), cut)

    def drop_hosts_of(self, name: str, hosts: Collection[str]) -> None:
        """Close connections using the addresses ``hosts``, which the node ``name`` no longer has."""
        self._links.drop_hosts(other=hosts)
        cut = self.reach.sockets.cut_hosts(other=hosts) + self._peers.sockets.cut_hosts(other=hosts)
        if cut:
            lost = ", ".join(sorted(hosts))
            log.info("node %s lost the address %s: closed %d connections with it", name, lost, cut)

    def callers(self) -> frozenset[str]:
        """Return the nodes that have opened a connection to this one."""
        return self._peers.callers()

    def change_secret(self, closed: Mapping[str, Collection[Address]]) -> None:
        """Use the changed secret for new connections; abort those with some nodes (id → addresses)."""
        self.reach.forget_contexts()
        for node, addresses in closed.items():
            self._peers.cut(node)
            self.reach.sockets.cut_peers(addresses)
        self._peers.change_identity()

    async def leave_cluster(self) -> None:
        """Close all connections: they lead to nodes of a cluster that this one has left."""
        for node in self._links.up():
            self._links.drop_node(node)
        for node in self._peers.callers():
            self._peers.cut(node)
        await self._calls.close()
