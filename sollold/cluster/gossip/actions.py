"""What the gossip core asks of the shell around it. Carried out in the order given."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass

Address = tuple[str, int]
"""IP literal (IPv4, IPv6, or IPv6 with its scope: ``fe80::1%eth0``) and port. UDP and TCP share the port."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What must survive a restart. A node that lost it learns the like from its peers.

    Attributes:
        term: the highest term seen; claims are above it.
        version: the record's version was never above this (it is written ahead, so seldom).
        incarnation: of the membership, as last used.
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
    """Write ``kept`` to disk, then call `Gossip.persisted`, also when it could not be written.

    Nothing waits for it: a disk may take longer than others take to hold a silent node dead. Of several
    the last is enough.
    """

    kept: Kept


@dataclass(frozen=True, slots=True)
class PushPullWith:
    """Exchange whole states over TCP with the first of ``addresses`` that answers.

    Send `Gossip.push_pull_open`, then give every body received to `Gossip.push_pull` and send what it
    returns, until one side has nothing to say. ``node`` is empty when it is not known who is there, if
    anybody: such tries must not hold up the others.
    Report the end with `Gossip.push_pull_done`, also when it failed.
    """

    node: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class TcpPing:
    """Ask ``node`` over TCP whether it lives; if so call `Gossip.tcp_pong` with ``sequence``.

    A failure need not be reported. Give up after ``timeout`` seconds.
    """

    node: str
    addresses: tuple[Address, ...]
    sequence: int
    timeout: float


class Change(StrEnum):
    """What became different."""

    JOINED = "joined"
    """A node is there that was not, or was dead or left."""
    RESTARTED = "restarted"
    """Its process is another one (new boot), though it was never found dead: links to it are void."""
    MOVED = "moved"
    """Its addresses changed."""
    SUSPECTED = "suspected"
    CLEARED = "cleared"
    """A suspicion was refuted."""
    DIED = "died"
    LEFT = "left"
    UPDATED = "updated"
    """Its record changed."""
    LEADER = "leader"
    """Another term holds, or none (``term.leader`` empty)."""
    CLONED = "cloned"
    """Another machine that lives uses our node id."""
    DOUBLED = "doubled"
    """Two machines that live use the node's id."""


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """Something that others may want to know. ``term`` is set for LEADER only."""

    change: Change
    node: str
    term: Term = field(default_factory=Term)


Action = Send | Persist | PushPullWith | TcpPing | NodeEvent
