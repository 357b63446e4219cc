"""How this node's part in the cluster does, for doctor and metrics."""

from __future__ import annotations

from dataclasses import field

from sollold.cluster.gossip.double import Double
from sollold.cluster.net.mdns import DiscoveryStatus
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A look at it.

    Attributes:
        discovery: of mDNS; None when the settings turn it off.
        links: nodes that a standing link is up with.
        health: 0 good, up to 7: this node is slow or badly connected.
        rejected: packets that were opened but not understood.
        refused: datagrams dropped unopened, by reason (`sollold.cluster.net.packet_seal.DropReason`).
        unsent: datagrams the system did not take.
        unheard: names of live nodes on this one's own network that mDNS, which works, has never shown.
        cloned: another machine that uses our node id was heard since the start.
        doubles: node ids that two machines use at present.
        unread: nodes of another release → the fields of their records that are not understood here.
        formats: IP addresses of nodes of another release → the format of their packets.
        disbelieved: statements of members that were dropped, by reason (`Gossip.refused`).
    """

    discovery: DiscoveryStatus | None
    links: tuple[str, ...]
    health: int
    rejected: int
    refused: dict[str, int]
    unsent: int
    unheard: tuple[str, ...]
    cloned: bool
    disbelieved: dict[str, int] = field(default_factory=dict)
    doubles: tuple[Double, ...] = ()
    unread: dict[str, tuple[str, ...]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
