"""Push-pull: two nodes compare their full states, and each gets the records that are newer at the other.

There are three bodies. The opener lists its view of every node and the version of each record. The response
lists the same, includes the records that are newer there and names those that are newer at the opener. The
third includes those. So an exchange between equals is small, whatever the size of the records.
"""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.packet import FORMAT, MemberState, PushPull, Whole, encode
from sollold.cluster.gossip.registry import Merge, Registry

_MAX_BYTES = 12 * 1024 * 1024
"""Maximum bytes of records in one body; the rest follows in a later exchange."""
_MAX_NEW = _MAX_RECORDS = 256
"""Maximum unknown nodes and records accepted from one body: checking a signature takes time."""
_MAX_REFUSED = 16
"""Forged statements after which the rest of a body's members is ignored."""


class PushPullExchange:
    """Builds and merges the bodies."""

    def __init__(self, membership: Membership, registry: Registry) -> None:
        self._membership = membership
        self._registry = registry

    def _body(self, stage: int, held: list[MemberState], wanted: list[str], records: list[Whole]) -> bytes:
        own = self._membership.own
        return encode(PushPull(FORMAT, stage, own.node, own.boot, held, wanted, records))

    def _held(self) -> list[MemberState]:
        own = self._membership.own
        held = [] if own.withdrawn else [own.state(self._registry.me.version)]
        for member in self._membership.members.values():
            register = self._registry.get(member.node)
            version, boot = (register.version, register.boot) if register is not None else (0, 0)
            held.append(member.summary(version, boot))
        return held

    def first_body(self) -> bytes:
        """Return the body that starts an exchange: all members, no records yet."""
        return self._body(0, self._held(), [], [])

    def merge(self, body: PushPull, now: float) -> tuple[bytes, list[tuple[str, Merge]]]:
        """Merge a received body. Returns the response (empty: none) and the results for its records."""
        answer = self._held() if body.stage == 0 else []
        self._hear_members(body, now)
        known = {self._membership.me, *self._membership.members}
        merged = [
            (whole.node, self._registry.merge_whole(whole))
            for whole in body.records[:_MAX_RECORDS]
            if whole.node in known
        ]
        if body.stage == 2:
            return b"", merged
        wanted, records = self._compare(body)
        if body.stage == 0:
            return self._body(1, answer, wanted, records), merged
        requested = set(body.wanted)
        records = _fitting(whole for whole in self._wholes() if whole.node in requested)
        return (self._body(2, [], [], records) if records else b""), merged

    def _hear_members(self, body: PushPull, now: float) -> None:
        """Merge members: a limited number of new nodes, and none after too many forged ones."""
        members = self._membership.members
        limit = self._membership.refused + _MAX_REFUSED
        room = _MAX_NEW
        for held in body.held:
            if held.node not in members and held.node != self._membership.me:
                room -= 1
                if room < 0:
                    continue
            self._membership.hear_member_state(held, body.sender, now)
            if self._membership.refused >= limit:
                return

    def _wholes(self) -> list[Whole]:
        nodes = [*([] if self._membership.own.withdrawn else [self._membership.me]), *self._membership.live]
        wholes = [self._registry.whole(node) for node in nodes]
        return [whole for whole in wholes if whole is not None]

    def _compare(self, body: PushPull) -> tuple[list[str], list[Whole]]:
        """Return the nodes whose record is newer at the sender, and the records that are newer here."""
        listed = {held.node: (held.version, held.version_boot) for held in body.held}
        wanted = []
        for held in body.held:
            register = self._registry.get(held.node)
            known = (register.version, register.boot) if register is not None else (0, 0)
            if held.node == self._membership.me:
                newer_there = self._registry.is_ahead(held.version, held.version_boot)
            else:
                newer_there = bool(held.version) and (held.version, held.version_boot) > known
            if newer_there:
                wanted.append(held.node)
        newer = (
            whole for whole in self._wholes() if (whole.version, whole.boot) > listed.get(whole.node, (0, 0))
        )
        return wanted, _fitting(newer)


def _fitting(wholes: Iterable[Whole]) -> list[Whole]:
    """Return the first records, as many as one body carries."""
    fitting: list[Whole] = []
    room = _MAX_BYTES
    for whole in wholes:
        room -= len(bytes(whole.record))
        if room < 0 or len(fitting) == _MAX_RECORDS:
            break
        fitting.append(whole)
    return fitting
