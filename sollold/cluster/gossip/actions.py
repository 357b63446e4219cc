"""Actions that the gossip core requests from the I/O shell, which carries them out in the given order."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass

Address = tuple[str, int]
"""IP literal (IPv4, IPv6, or IPv6 with its scope: ``fe80::1%eth0``) and port. UDP and TCP share the port."""


@dataclass(frozen=True, slots=True)
class PersistedState:
    """State that should survive a restart. A node that lost it recovers equivalent values from its peers.

    Attributes:
        term: the highest term seen; new claims are above it.
        version: upper bound of the record versions used so far; written ahead, so that writes are rare.
        incarnation: the last incarnation used by the membership protocol.
    """

    term: Term = field(default_factory=Term)
    version: int = 0
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Send:
    """Seal ``data`` and send it as one datagram."""

    address: Address
    data: bytes


@dataclass(frozen=True, slots=True)
class Persist:
    """Write ``kept`` to disk, then call `Gossip.persisted`, even if the write failed.

    Nothing waits for the write: a disk may take longer than peers take to declare a silent node dead. Of
    several pending ones only the last needs to be written.
    """

    kept: PersistedState


@dataclass(frozen=True, slots=True)
class PushPullWith:
    """Exchange full states over TCP with the first of ``addresses`` that responds.

    Send `Gossip.push_pull_open`, then pass every received body to `Gossip.push_pull` and send what it
    returns, until one side has nothing to send. ``node`` is empty if it is unknown which node, if any, is at
    the addresses: such attempts must not delay others.
    Report the end with `Gossip.push_pull_done`, even if the exchange failed.
    """

    node: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class TcpPing:
    """Ping ``node`` over TCP; if it responds, call `Gossip.tcp_pong` with ``sequence``.

    A failure need not be reported. Give up after ``timeout`` seconds.
    """

    node: str
    addresses: tuple[Address, ...]
    sequence: int
    timeout: float


class Change(StrEnum):
    """Kind of a `NodeEvent`."""

    JOINED = "joined"
    """A node appeared that was unknown, dead or had left."""
    RESTARTED = "restarted"
    """The node's process changed (new boot), but it was never declared dead: connections to it are void."""
    MOVED = "moved"
    """The node's addresses changed."""
    SUSPECTED = "suspected"
    CLEARED = "cleared"
    """A suspicion was refuted."""
    DIED = "died"
    LEFT = "left"
    UPDATED = "updated"
    """The node's record changed."""
    LEADER = "leader"
    """The current term changed, or there is none now (``term.leader`` empty)."""
    CLONED = "cloned"
    """Another live machine uses this node's id."""
    DOUBLED = "doubled"
    """Two live machines use the same node id."""


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A change that observers may act on. ``term`` is set for LEADER only."""

    change: Change
    node: str
    term: Term = field(default_factory=Term)


Action = Send | Persist | PushPullWith | TcpPing | NodeEvent
