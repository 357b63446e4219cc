"""Finds possible addresses of other nodes: from mDNS, the settings and earlier runs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.gossip_runner import GossipRunner
from sollold.cluster.net.identity import Identity
from sollold.cluster.net.interfaces import TUNNEL_RANK, Interface, InterfaceWatch, tellable, within
from sollold.cluster.net.mdns import Discovery, DiscoveryStatus
from sollold.cluster.net.seeds import Seed, resolve
from sollold.cluster.net.state_file import Peer, RememberedPeers
from sollold.retry import LogAndRetry
from sollold.settings.schema import ClusterSettings

log = logging.getLogger("sollold.cluster")

_ROUND_SECONDS = 30.0
"""Interval at which seeds are resolved again and announced nodes that are not alive are retried."""


class PeerFinder:
    """Introduces possible nodes to the gossip core, and keeps this node's own addresses up to date.

    Args:
        settings: the cluster's settings.
        identity: this node's identity.
        runner: runs the gossip core.
        state: folder of the file with the peers of earlier runs.
        addresses: returns this node's current addresses.
        use_addresses: called when the interfaces' addresses changed.
        lost: called with addresses that this machine no longer has.

    Attributes:
        unheard: live nodes on this node's own networks not yet seen by mDNS, as found in two rounds.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        identity: Identity,
        runner: GossipRunner,
        state: Path,
        *,
        addresses: Callable[[], tuple[str, ...]],
        use_addresses: Callable[[tuple[str, ...]], None],
        lost: Callable[[frozenset[str]], None],
    ) -> None:
        self.unheard: frozenset[str] = frozenset()
        self._settings = settings
        self._identity = identity
        self._runner = runner
        self._addresses = addresses
        self._use_addresses = use_addresses
        self._lost = lost
        self._remembered = RememberedPeers(state, self._contacts)
        self._earlier: tuple[Peer, ...] = ()
        self._seeds: dict[Seed, tuple[Address, ...]] = {}
        self._discovery: Discovery | None = None
        self._interfaces: InterfaceWatch | None = None
        self._networks: tuple[str, ...] = ()
        self._last_connected: tuple[Interface, ...] = ()
        self._unseen: frozenset[str] = frozenset()
        self._port = 0
        self._ipv6 = False
        self._closing = False

    async def read_earlier(self) -> None:
        """Read the peers of earlier runs.

        Raises:
            OSError: the folder can't be read.
        """
        self._earlier = await self._remembered.read()

    async def start(
        self, seeds: Iterable[Seed], *, boot: int, port: int, host: str, fixed: str, https: bool
    ) -> None:
        """Announce this node and look for others.

        Args:
            boot: this process' boot number.
            port: the port for nodes.
            host: the address listened on.
            fixed: the one address named by the settings; empty: those of the interfaces.
            https: announce that clients must use HTTPS.
        """
        assert self._runner.gossip is not None
        settings = self._settings
        self._port, self._ipv6 = port, host == "::"
        if settings.mdns:
            self._discovery = Discovery(
                node=self._identity.node,
                boot=boot,
                clusters=self._identity.tokens.clusters,
                port=port,
                found=self._announced,
                ipv6=":" in host,
                named=settings.interfaces,
                https=https,
            )
        if not fixed:
            self._interfaces = InterfaceWatch(settings.interfaces, self._use_interfaces, self._lost)
            await self._interfaces.start()
        elif self._discovery is not None:
            self._discovery.use_interfaces(
                (Interface("", 0, (), (fixed,)) if ":" in fixed else Interface("", 0, (fixed,)),)
            )
        self._runner.do(self._runner.gossip.evict(frozenset(self._identity.refused), time.monotonic()))
        for peer in self._earlier:
            if peer.node not in (self._identity.node, *self._identity.refused) and peer.addresses:
                self.introduce(peer.addresses, peer.node)
        self._runner.spawn(self._rounds(tuple(seeds)))

    def stop(self) -> None:
        """Ignore further changes: the node leaves."""
        self._closing = True

    async def close(self) -> None:
        """Withdraw the announcement and stop watching the interfaces."""
        parts = [part.close() for part in (self._discovery, self._interfaces) if part is not None]
        await asyncio.gather(*parts)

    async def close_file(self) -> None:
        """Write the list of peers."""
        await self._remembered.close()

    def remember(self) -> None:
        """Save the live peers: they, or their addresses, changed."""
        self._remembered.update()

    def introduce(self, addresses: tuple[Address, ...], source: str) -> None:
        """Introduce a node that is, or was, at one of ``addresses``; retried until one is there.

        ``source``: as in `Gossip.introduce`.
        """
        gossip = self._runner.gossip
        if gossip is not None:
            self._runner.do(gossip.introduce(addresses, time.monotonic(), keep=True, source=source))

    def status(self) -> DiscoveryStatus | None:
        """Return the status of mDNS; None if the settings turn it off."""
        return self._discovery.status() if self._discovery is not None else None

    def announces(self, nodes: Container[str]) -> bool:
        """Whether one of ``nodes`` is announced on the LAN under another cluster name."""
        return self._discovery is not None and self._discovery.announces(nodes)

    def change_clusters(self, clusters: tuple[str, ...]) -> None:
        """Change the names of the cluster."""
        if self._discovery is not None:
            self._discovery.change_clusters(clusters)

    def strangers(self, known: Iterable[str]) -> list[tuple[Address, ...]]:
        """Return addresses of possible nodes of other clusters: from mDNS, the settings and earlier runs.

        Args:
            known: members of the cluster, some of which may have moved to another one.
        """
        gossip = self._runner.gossip
        contacts = self._contacts()
        live = {address for peer in contacts for address in peer.addresses}
        live |= {(ip, self._port) for ip in self._addresses()}
        named = [*self._seeds.values(), *(peer.addresses for peer in self._earlier)]
        announced = self._discovery.foreign() if self._discovery is not None else ()
        if gossip is not None:
            named += [gossip.known.addresses(node) for node in known]
        found = dict.fromkeys((*announced, *(addresses for addresses in named if addresses)))
        return [addresses for addresses in found if live.isdisjoint(addresses)]

    def _use_interfaces(self, found: tuple[Interface, ...]) -> None:
        """Handle changed interfaces."""
        if self._runner.gossip is None or self._closing:
            return
        self._networks = tuple(network for interface in found for network in interface.networks)
        if any(interface.rank < TUNNEL_RANK for interface in found) or (found and self._settings.interfaces):
            self._last_connected = found
        # While no network card is up, the addresses it had stay announced: once it is up again, peers would
        # first hear that this node lost them, and close connections that survived.
        addresses = tellable((*self._last_connected, *found), ipv6=self._ipv6)
        if addresses != self._addresses():
            log.info("addresses: %s", ", ".join(addresses) or "none")
            self._use_addresses(addresses)
        if self._discovery is not None:
            self._discovery.use_interfaces(found)

    def _announced(self, node: str, addresses: tuple[Address, ...]) -> None:
        gossip = self._runner.gossip
        if gossip is None or self._closing:
            return
        if node == self._identity.node or not gossip.known.alive(node):
            self._runner.do(gossip.introduce(addresses, time.monotonic()))

    async def _rounds(self, seeds: tuple[Seed, ...]) -> None:
        """Try seeds and announced nodes again every half minute."""
        attempt = LogAndRetry("the search for nodes", log)
        while True:
            with attempt:
                # Together: a name server that does not answer delays no seed but its own.
                await asyncio.gather(*map(self._try_seed, seeds))
                if self._discovery is not None:
                    for node, addresses in self._discovery.seen().items():
                        self._announced(node, addresses)
                    self._check_multicast(self._discovery)
            await asyncio.sleep(_ROUND_SECONDS * random.uniform(0.9, 1.1))

    async def _try_seed(self, seed: Seed) -> None:
        self._seeds[seed] = addresses = await resolve(seed)
        if addresses:
            self.introduce(addresses, f"{seed.host}:{seed.port}")

    def _check_multicast(self, discovery: Discovery) -> None:
        """Find live nodes on our own networks that mDNS has not seen, as found in two consecutive rounds."""
        unseen: frozenset[str] = frozenset()
        if discovery.status().working:
            local = {
                peer.node
                for peer in self._contacts()
                if peer.addresses and within(peer.addresses[0][0], self._networks)
            }
            unseen = frozenset(local - discovery.seen().keys())
        self.unheard, self._unseen = unseen & self._unseen, unseen

    def _contacts(self) -> tuple[Peer, ...]:
        contacts = self._runner.gossip.known.contacts() if self._runner.gossip is not None else ()
        return tuple(Peer(node, addresses) for node, addresses in contacts)
