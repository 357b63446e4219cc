"""The records of all nodes: registers with one writer each, merged by the greatest (version, boot).

No clock takes part. The writer raises the version with each change and starts above every version it
used before, which it keeps on disk. If the disk was lost it meets its old record at a peer (same node,
another boot) and raises itself above it.

News of a record is a `Delta`: the fields changed last, as many as fit one datagram, and as ``base`` the
version of the newest change among the fields left out. Whoever has a version from ``base`` on gets the
whole of the new one by replacing just these fields; whoever has an older one fetches it over TCP.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import fields, replace
from enum import Enum, auto
from typing import Any, get_type_hints

import msgspec
from msgspec import Raw

from sollold.cluster.packet import RECORD_LIMIT, Delta, Whole, encode
from sollold.cluster.record import Record
from sollold.cluster.term import Term

AHEAD = 4096
"""Versions written to disk ahead of use."""

_types = get_type_hints(Record)
_names = tuple(field.name for field in fields(Record) if field.name not in ("node", "version"))
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(_types[name]) for name in _names
}
_whole = msgspec.msgpack.Decoder(Record)
_parts = msgspec.msgpack.Decoder(dict[str, Raw])


class Merge(Enum):
    """What became of a record that came in."""

    NEWER = auto()
    OLD = auto()
    BEHIND = auto()
    """It is newer, but builds on a version that is not here."""
    BROKEN = auto()
    """It is no record."""
    RAISED = auto()
    """It was our own of an earlier boot; ours is above it now."""


class Register:
    """One node's record as held here."""

    __slots__ = ("boot", "encoded", "record", "version")

    def __init__(self, boot: int, version: int, record: Record) -> None:
        self.boot = boot
        self.version = version
        self.record = record
        self.encoded = b""

    def whole(self) -> Whole:
        """To be sent over TCP."""
        if not self.encoded:
            self.encoded = encode(self.record)
        return Whole(self.record.node, self.boot, self.version, Raw(self.encoded))


class Registry:
    """All registers, the own one among them.

    Args:
        record: the own one; its ``version`` is replaced.
        boot: of this process.
        version: the greatest that an earlier process may have used.
    """

    def __init__(self, record: Record, boot: int, version: int) -> None:
        self._me = record.node
        own = Register(boot, version + 1, replace(record, version=version + 1))
        self._registers = {self._me: own}
        self._own = own
        self._parts: dict[str, bytes] = {name: encode(getattr(record, name)) for name in _names}
        self._changed = dict.fromkeys(_names, own.version)
        self.ceiling = own.version + AHEAD
        """The own version stays below it until it is written anew."""
        self.highest = Term()
        """The highest claim in any record ever seen here."""
        self.stirred = False
        """A record came that may change who leads; the reader sets it back."""

    @property
    def me(self) -> Record:
        """The own record."""
        return self._own.record

    def get(self, node: str) -> Register | None:
        """What is held of ``node``."""
        return self._registers.get(node)

    def forget_all_but(self, nodes: Collection[str]) -> None:
        """Drop the records of nodes that are gone for good."""
        for node in [node for node in self._registers if node != self._me and node not in nodes]:
            del self._registers[node]

    def update(self, record: Record) -> bool:
        """Take ``record`` (but for its version) as the own one; False when nothing changed."""
        version = self._own.version + 1
        changed = False
        for name in _names:
            value = encode(getattr(record, name))
            if value != self._parts[name]:
                self._parts[name] = value
                self._changed[name] = version
                changed = True
        if changed:
            self._set(version, record)
        return changed

    def _set(self, version: int, record: Record) -> None:
        own = self._own
        own.version = version
        own.record = replace(record, node=self._me, version=version)
        own.encoded = b""
        if version >= self.ceiling - AHEAD // 2:
            # Early enough that a slow disk has it before these versions are used.
            self.ceiling = version + AHEAD

    def meet(self, version: int, boot: int) -> bool:
        """A peer holds this version of our record. If another boot made it, go above it: then True."""
        if boot == self._own.boot or version < self._own.version:
            return False
        self._set(version + 1, self._own.record)
        self._changed = dict.fromkeys(_names, version + 1)
        return True

    def delta(self, room: int, enough: int) -> bytes:
        """News of the own record, encoded, in at most ``room`` bytes.

        Older changes come along up to ``enough`` bytes only: most peers have them.
        """
        own = self._own
        names = sorted(_names, key=self._changed.__getitem__, reverse=True)
        base = 0
        while names:
            message = _encode_delta(own, base, {name: self._parts[name] for name in names})
            newest = self._changed[names[0]] == self._changed[names[-1]]
            if len(message) <= (room if newest else enough):
                return message
            base = self._changed[names[-1]]
            names = [name for name in names if self._changed[name] > base]
        return encode(Delta(self._me, own.boot, own.version, own.version, b""))

    def delta_of(self, node: str, room: int) -> bytes:
        """News of another's record: all of it if it fits ``room``, else that there is something new."""
        register = self._registers[node]
        parts = {name: encode(getattr(register.record, name)) for name in _names}
        message = _encode_delta(register, 0, parts)
        if len(message) <= room:
            return message
        return encode(Delta(node, register.boot, register.version, register.version, b""))

    def _order(self, node: str, version: int, boot: int) -> Merge:
        held = self._registers.get(node)
        if node == self._me:
            return Merge.RAISED if self.meet(version, boot) else Merge.OLD
        if held is not None and (version, boot) <= (held.version, held.boot):
            return Merge.OLD
        return Merge.NEWER

    def merge_delta(self, delta: Delta) -> Merge:
        """Take news of a record in."""
        order = self._order(delta.node, delta.version, delta.boot)
        if order is not Merge.NEWER:
            return order
        held = self._registers.get(delta.node)
        if delta.base and (held is None or held.boot != delta.boot or held.version < delta.base):
            return Merge.BEHIND
        if not delta.fields:
            return Merge.BEHIND
        try:
            expand = zlib.decompressobj()
            data = expand.decompress(delta.fields, RECORD_LIMIT)
            if not expand.eof or expand.unused_data:
                return Merge.BROKEN
            parts: dict[str, Any] = _parts.decode(data)
            if not delta.base:
                parts["node"] = Raw(encode(delta.node))
                parts["version"] = Raw(encode(delta.version))
                record = _whole.decode(encode(parts))
            else:
                assert held is not None
                changes = {
                    name: _decoders[name].decode(part) for name, part in parts.items() if name in _decoders
                }
                record = replace(held.record, version=delta.version, **changes)
        except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError):
            return Merge.BROKEN
        self._store(delta.boot, delta.version, record)
        return Merge.NEWER

    def merge_whole(self, whole: Whole) -> Merge:
        """Take a record in that came over TCP."""
        order = self._order(whole.node, whole.version, whole.boot)
        if order is not Merge.NEWER:
            return order
        if len(bytes(whole.record)) > RECORD_LIMIT:
            return Merge.BROKEN
        try:
            record = _whole.decode(whole.record)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return Merge.BROKEN
        if record.node != whole.node or record.version != whole.version:
            return Merge.BROKEN
        self._store(whole.boot, whole.version, record)
        return Merge.NEWER

    def _store(self, boot: int, version: int, record: Record) -> None:
        held = self._registers.get(record.node)
        if held is None or (held.record.claim, held.record.draining) != (record.claim, record.draining):
            self.stirred = True
        self._registers[record.node] = Register(boot, version, record)
        self.highest = max(self.highest, record.claim)


def _encode_delta(register: Register, base: int, parts: dict[str, bytes]) -> bytes:
    body = encode({name: Raw(part) for name, part in parts.items()})
    node = register.record.node
    return encode(Delta(node, register.boot, base, register.version, zlib.compress(body, 1)))
