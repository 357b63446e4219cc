"""Read-only view of what a node knows of its cluster: live nodes, records, addresses, the leader, faults."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.double import Double
from sollold.cluster.gossip.leadership import Leadership
from sollold.cluster.gossip.member import Status
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.other_formats import OtherFormats
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.records import Records
from sollold.cluster.gossip.registry import Registry
from sollold.cluster.gossip.term import Term

_MANY_PROBES = 10
"""Probes without an ack in between that show that hardly any datagram gets through."""


class Known:
    """Queries on the parts of a gossip core; they change nothing."""

    def __init__(
        self,
        membership: Membership,
        registry: Registry,
        leadership: Leadership,
        records: Records,
        other_formats: OtherFormats,
    ) -> None:
        self._me = membership.me
        self._membership = membership
        self._registry = registry
        self._leadership = leadership
        self._records = records
        self._other_formats = other_formats

    @property
    def me(self) -> Record:
        """This node's record, with its version and claim."""
        return self._registry.me

    def leader(self) -> Term:
        """Return the current term; ``leader`` is empty while there is none."""
        return self._leadership.term

    def live(self) -> tuple[Record, ...]:
        """Return the records of the live nodes, including this one, by node id.

        Missing ones are left out, and those of a process that was replaced: all that they show has ended.
        """
        found = []
        for node in sorted([self._me, *self._membership.live]):
            register = self._registry.get(node)
            if register is not None and register.boot >= self.boot(node):
                found.append(register.record)
        return tuple(found)

    def record(self, node: str) -> Record | None:
        """Return the last record of ``node``, alive or not."""
        register = self._registry.get(node)
        return register.record if register is not None else None

    def alive(self, node: str) -> bool:
        """Whether ``node`` is considered alive (suspected nodes are)."""
        member = self._membership.members.get(node)
        return node == self._me or (member is not None and member.live)

    def left(self, node: str) -> bool:
        """Whether ``node`` left and has not come back since."""
        member = self._membership.members.get(node)
        return member is not None and member.status is Status.LEFT

    def addresses(self, node: str) -> tuple[Address, ...]:
        """Return the addresses of ``node``: first the one its last datagram came from. Empty: unknown."""
        member = self._membership.members.get(node)
        return member.everywhere() if member is not None else ()

    def barred(self, node: str, boot: int) -> bool:
        """Whether this process shares its node id with another live one and is ignored."""
        return self._membership.barred(node, boot)

    def doubles(self, now: float) -> tuple[Double, ...]:
        """Return the node ids, possibly including this one's, that two machines use at present."""
        found = []
        own = self._membership.own
        if own.double:
            own_host = own.addresses[0][0] if own.addresses else ""
            kept, other = (own.double, own_host) if own.withdrawn else (own_host, own.double)
            found.append(Double(self._me, kept, other))
        for node in self._membership.live:
            member = self._membership.members[node]
            other_host = member.processes.other(now)
            if other_host is not None:
                host = member.addresses[0][0] if member.addresses else ""
                found.append(Double(node, host, other_host))
        return tuple(found)

    def unanswered(self) -> tuple[str, ...]:
        """Return live nodes with which datagrams, or the responses to them, do not get through."""
        members = self._membership.members
        return tuple(node for node in self._membership.live if members[node].unanswered >= _MANY_PROBES)

    def lost_hosts(self, node: str) -> frozenset[str]:
        """Return the hosts that ``node`` had before its last move and no longer has."""
        member = self._membership.members.get(node)
        return member.lost if member is not None else frozenset()

    def boot(self, node: str) -> int:
        """Return the boot number of ``node``; 0 if unknown."""
        member = self._membership.members.get(node)
        return member.boot if member is not None else 0

    def others(self) -> tuple[str, ...]:
        """Return all other nodes considered alive."""
        return tuple(self._membership.live)

    def contacts(self) -> tuple[tuple[str, tuple[Address, ...]], ...]:
        """Return all other nodes considered alive with their addresses, to be remembered on disk."""
        return tuple((node, self.addresses(node)) for node in sorted(self._membership.live))

    @property
    def rejected(self) -> int:
        """Number of packets, push-pull bodies and records that could not be decoded."""
        return self._records.rejected

    @property
    def refused(self) -> dict[str, int]:
        """Numbers of refused statements of members, by reason.

        ``forged``: not signed by the node they are about, or with implausible counters. ``record``: signed
        records with implausible values.
        """
        counts = self._records.refused
        return {**counts, "forged": counts["forged"] + self._membership.refused}

    def other_formats(self, now: float) -> dict[str, int]:
        """Return IP addresses of nodes of other releases → the format of their packets."""
        return self._other_formats.heard(now)

    def unread(self) -> dict[str, tuple[str, ...]]:
        """Return nodes of other releases → the fields of their records that are not understood here."""
        return self._registry.unread()
