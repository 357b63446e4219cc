"""Push-pull: two nodes compare all that they hold, and each gets the records that are newer at the other.

Three bodies: the opener tells what it holds of every node, and the version of each record. The answer
tells the same, brings the records that are newer there and names those that are newer here. The third
brings these. So an exchange between equals is small, whatever the size of the records.
"""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.membership import Membership, Status
from sollold.cluster.packet import FORMAT, Held, PushPull, Whole, encode
from sollold.cluster.registry import Merge, Registry

_ROOM = 12 * 1024 * 1024
"""Bytes of records in one body; what does not fit comes with a later exchange."""


class Exchange:
    """Makes and takes the bodies."""

    def __init__(self, membership: Membership, registry: Registry) -> None:
        self._membership = membership
        self._registry = registry

    def _body(self, stage: int, held: list[Held], wanted: list[str], records: list[Whole]) -> bytes:
        me = self._membership
        return encode(PushPull(FORMAT, stage, me.me, me.boot, held, wanted, records))

    def _held(self) -> list[Held]:
        me = self._membership
        own = self._registry.me
        held = [Held(me.me, me.boot, me.incarnation, _mine(me), me.addresses, own.version, me.boot)]
        for member in me.members.values():
            register = self._registry.get(member.node)
            version, boot = (register.version, register.boot) if register is not None else (0, 0)
            held.append(
                Held(
                    member.node,
                    member.boot,
                    member.incarnation,
                    member.status,
                    member.everywhere()[:8],
                    version,
                    boot,
                )
            )
        return held

    def open(self) -> bytes:
        """The first body."""
        return self._body(0, self._held(), [], [])

    def take(self, body: PushPull, now: float) -> tuple[bytes, list[tuple[str, Merge]]]:
        """A body from the other side → the answer (empty: none), and what became of its records."""
        answer = self._held() if body.stage == 0 else []
        merged = []
        for held in body.held:
            self._membership.hear_held(held, body.sender, now)
            if held.node == self._membership.me and self._registry.meet(held.version, held.version_boot):
                merged.append((held.node, Merge.RAISED))
        known = {self._membership.me, *self._membership.members}
        merged += [
            (whole.node, self._registry.merge_whole(whole)) for whole in body.records if whole.node in known
        ]
        if body.stage == 2:
            return b"", merged
        wanted, records = self._compare(body)
        if body.stage == 0:
            return self._body(1, answer, wanted, records), merged
        asked = set(body.wanted)
        records = _fitting(whole for whole in self._wholes() if whole.node in asked)
        return (self._body(2, [], [], records) if records else b""), merged

    def _wholes(self) -> list[Whole]:
        nodes = [self._membership.me, *self._membership.live]
        registers = [self._registry.get(node) for node in nodes]
        return [register.whole() for register in registers if register is not None]

    def _compare(self, body: PushPull) -> tuple[list[str], list[Whole]]:
        """Nodes whose record is newer there; records that are newer here."""
        theirs = {held.node: (held.version, held.version_boot) for held in body.held}
        wanted = []
        for held in body.held:
            register = self._registry.get(held.node)
            mine = (register.version, register.boot) if register is not None else (0, 0)
            if held.version and (held.version, held.version_boot) > mine and held.node != self._membership.me:
                wanted.append(held.node)
        newer = (
            whole for whole in self._wholes() if (whole.version, whole.boot) > theirs.get(whole.node, (0, 0))
        )
        return wanted, _fitting(newer)


def _fitting(wholes: Iterable[Whole]) -> list[Whole]:
    """The first of them, as many as one body carries."""
    fitting = []
    room = _ROOM
    for whole in wholes:
        room -= len(bytes(whole.record))
        if room < 0:
            break
        fitting.append(whole)
    return fitting


def _mine(membership: Membership) -> Status:
    return Status.LEFT if membership.leaving else Status.ALIVE
