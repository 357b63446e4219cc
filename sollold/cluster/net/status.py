"""Status of this node's part in the cluster, for doctor and metrics."""

from __future__ import annotations

from dataclasses import field

from sollold.cluster.gossip.double import Double
from sollold.cluster.net.mdns import DiscoveryStatus
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A snapshot of the status.

    Attributes:
        discovery: status of mDNS; None if the settings turn it off.
        links: nodes with a standing link.
        rejected: number of packets, push-pull bodies and records that could not be decoded.
        refused: datagrams dropped undecrypted, by reason (`sollold.cluster.net.packet_seal.DropReason`).
        unheard: names of live nodes on this node's own networks that mDNS, although it works, has never seen.
        cloned: another machine with our node id was noticed since the start.
        doubles: node ids currently used by two machines.
        unread: nodes of another release → the fields of their records that are not understood here.
        formats: IP addresses of nodes of another release → the format of their packets.
        unanswered: names of live nodes that answer pings only by TCP, not by UDP.
        disbelieved: dropped statements of members, by reason (`Known.refused`).
    """

    discovery: DiscoveryStatus | None
    links: tuple[str, ...]
    rejected: int
    refused: dict[str, int]
    unheard: tuple[str, ...]
    cloned: bool
    disbelieved: dict[str, int] = field(default_factory=dict)
    doubles: tuple[Double, ...] = ()
    unread: dict[str, tuple[str, ...]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    unanswered: tuple[str, ...] = ()
