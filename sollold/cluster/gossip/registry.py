"""The records of all nodes: registers with one writer each, merged by the greatest (version, boot).

A record is signed by its writer, over all fields as they were encoded, including those of later releases,
which are kept and passed on. A record received from others counts only with that signature, and only if it
is plausible (`record_check`).

No clock is involved. The writer raises the version with each change and starts above every version it
used before, which it keeps on disk. If the disk was lost it finds its old record at a peer (same node,
another boot) and raises its version above it.

Changes of a record spread as a `Delta`: the fields changed last, as many as fit one datagram, and as
``base`` the version of the newest change among the fields left out. A node with version ``base`` or later
gets the complete new record by replacing just these fields; one with an older version fetches it over TCP.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from enum import Enum, auto

import msgspec
from msgspec import Raw

from sollold.cluster.gossip.packet import RECORD_LIMIT, Delta, Whole, encode
from sollold.cluster.gossip.readable import readable_record
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.record_check import objection
from sollold.cluster.gossip.signing import Signer, record_content
from sollold.cluster.gossip.term import Term

AHEAD = 4096
"""Versions written to disk ahead of use."""

_names = tuple(field.name for field in fields(Record) if field.name not in ("node", "version"))
_whole = msgspec.msgpack.Decoder(Record)
_OUTER_FIELDS = frozenset(("node", "version"))
"""Sent beside the fields of a record."""
_parts = msgspec.msgpack.Decoder(dict[str, Raw])


class Merge(Enum):
    """Result of merging a received record."""

    NEWER = auto()
    OLD = auto()
    BEHIND = auto()
    """It is newer, but based on a version that is not known here."""
    BROKEN = auto()
    """It cannot be decoded."""
    IMPOSSIBLE = auto()
    """Its node signed it, but its values are implausible."""
    FORGED = auto()
    """It is not signed by its node."""
    RAISED = auto()
    """It was our own record from another boot; our version is above it now."""


class Register:
    """One node's record as known here."""

    __slots__ = ("boot", "encoded", "parts", "record", "signature", "unread", "version")

    def __init__(
        self,
        boot: int,
        version: int,
        record: Record,
        parts: Mapping[str, bytes],
        signature: bytes,
        unread: tuple[str, ...] = (),
    ) -> None:
        self.boot = boot
        self.version = version
        self.record = record
        self.parts = parts
        """Its fields as encoded by its writer."""
        self.signature = signature
        self.unread = unread
        """Fields with values unknown to this release."""
        self.encoded = b""

    def whole(self) -> Whole:
        """Return the complete record, to be sent over TCP."""
        if not self.encoded:
            fields = {name: Raw(part) for name, part in self.parts.items()}
            self.encoded = encode(fields | {"node": Raw(encode(self.record.node))})
        return Whole(self.record.node, self.boot, self.version, Raw(self.encoded), self.signature)


class Registry:
    """All registers, including this node's own.

    Args:
        record: this node's record; its ``version`` is replaced.
        boot: boot number of this process.
        version: the greatest version that an earlier process may have used.
        highest: the highest term seen by an earlier process.
        barred: (node, boot) → whether this process' statements about the node are ignored.
        key_of: returns the public key of a known node; None if unknown.
    """

    def __init__(
        self,
        record: Record,
        boot: int,
        version: int,
        *,
        signer: Signer,
        key_of: Callable[[str], bytes | None],
        highest: Term | None = None,
        barred: Callable[[str, int], bool] = lambda node, boot: False,
    ) -> None:
        self._me = record.node
        self._signer = signer
        self._key_of = key_of
        self._barred = barred
        self._parts: dict[str, bytes] = {name: encode(getattr(record, name)) for name in _names}
        own = Register(boot, version + 1, replace(record, version=version + 1), self._parts, b"")
        self._registers = {self._me: own}
        self._own = own
        self._changed = dict.fromkeys(_names, own.version)
        self.ceiling = own.version + AHEAD
        """The own version stays below it until a higher one was written to disk."""
        self.highest = highest or Term()
        """The highest term seen by an earlier process or claimed in any record received."""
        self.leader_may_change = False
        """A received record may change who leads; the reader resets it."""

    @property
    def me(self) -> Record:
        """This node's own record."""
        return self._own.record

    def get(self, node: str) -> Register | None:
        """Return the register of ``node``, if there is one."""
        return self._registers.get(node)

    def unread(self) -> dict[str, tuple[str, ...]]:
        """Return nodes of other releases → the fields of their records that are not understood here."""
        return {node: register.unread for node, register in self._registers.items() if register.unread}

    def whole(self, node: str) -> Whole | None:
        """Return the record of ``node``, to be sent over TCP; None if it is unknown."""
        if node == self._me:
            self._sign()
        register = self._registers.get(node)
        return register.whole() if register is not None else None

    def _sign(self) -> None:
        own = self._own
        if not own.signature:
            content = record_content(self._me, own.boot, own.version, self._parts)
            own.signature = self._signer.sign(content)

    def _signed(
        self, node: str, boot: int, version: int, parts: Mapping[str, bytes], signature: bytes
    ) -> bool:
        key = self._key_of(node)
        content = record_content(node, boot, version, parts)
        return key is not None and self._signer.verify(node, key, signature, content)

    def forget_barred(self, node: str) -> None:
        """Drop the record of ``node`` if it was written by an ignored process."""
        held = self._registers.get(node)
        if held is not None and node != self._me and self._barred(node, held.boot):
            del self._registers[node]

    def forget_all_but(self, nodes: Collection[str]) -> None:
        """Drop the records of all other nodes, which are gone for good."""
        for node in [node for node in self._registers if node != self._me and node not in nodes]:
            del self._registers[node]

    def update(self, record: Record) -> bool:
        """Replace this node's record (except its version); False if nothing changed."""
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
        own.encoded = own.signature = b""
        if version >= self.ceiling - AHEAD // 2:
            # Early enough for a slow disk to write it before these versions are used.
            self.ceiling = version + AHEAD

    def is_ahead(self, version: int, boot: int) -> bool:
        """Whether this version of our record, from another boot, hides ours, so that we must exceed it."""
        return boot != self._own.boot and version >= self._own.version

    def _rise_above(self, version: int) -> None:
        self._set(version + 1, self._own.record)
        self._changed = dict.fromkeys(_names, version + 1)

    def delta(self, room: int, enough: int) -> bytes:
        """Return an encoded `Delta` of this node's record, of at most ``room`` bytes.

        Older changes are included up to ``enough`` bytes only: most peers have them.
        """
        self._sign()
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
        """Return a `Delta` of another node's record: all of it if it fits ``room``, else only its version."""
        register = self._registers[node]
        message = _encode_delta(register, 0, register.parts)
        if len(message) <= room:
            return message
        return encode(Delta(node, register.boot, register.version, register.version, b""))

    def _is_news(self, node: str, version: int, boot: int) -> bool:
        held = self._registers.get(node)
        if node == self._me:
            return self.is_ahead(version, boot)
        if self._barred(node, boot):
            return False
        return held is None or (version, boot) > (held.version, held.boot)

    def merge_delta(self, delta: Delta) -> Merge:
        """Merge a received `Delta`."""
        if not self._is_news(delta.node, delta.version, delta.boot):
            return Merge.OLD
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
            parts = _decode_parts(data)
        except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError):
            return Merge.BROKEN
        if delta.base and held is not None:
            parts = {**held.parts, **parts}
        merge = self._take(delta.node, delta.boot, delta.version, parts, delta.signature)
        # The fields may stem from two writers if a member lied before: the whole record will tell.
        return Merge.BEHIND if merge is Merge.FORGED and delta.base else merge

    def merge_whole(self, whole: Whole) -> Merge:
        """Merge a complete record received over TCP."""
        if not self._is_news(whole.node, whole.version, whole.boot):
            return Merge.OLD
        data = bytes(whole.record)
        if len(data) > RECORD_LIMIT:
            return Merge.BROKEN
        try:
            parts = _decode_parts(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return Merge.BROKEN
        if parts.pop("node", b"") != encode(whole.node):
            return Merge.BROKEN
        return self._take(whole.node, whole.boot, whole.version, parts, whole.signature)

    def _take(self, node: str, boot: int, version: int, parts: dict[str, bytes], signature: bytes) -> Merge:
        """Store a record if its node signed it and it is plausible."""
        if sum(map(len, parts.values())) > RECORD_LIMIT:
            return Merge.BROKEN
        if not self._signed(node, boot, version, parts, signature):
            return Merge.FORGED
        if node == self._me:
            self._rise_above(version)
            return Merge.RAISED
        fields = {name: Raw(part) for name, part in parts.items() if name not in _OUTER_FIELDS}
        fields |= {"node": Raw(encode(node)), "version": Raw(encode(version))}
        try:
            record = _whole.decode(encode(fields))
            unread: tuple[str, ...] = ()
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # Its node signed it: it comes from a release with other fields or values.
            try:
                record, unread = readable_record(parts, node, version)
            except ValueError:
                return Merge.BROKEN
        held = self._registers.get(node)
        known = [] if held is None else [name for name in parts if held.parts.get(name) == parts[name]]
        if objection(record, self.highest, known):
            return Merge.IMPOSSIBLE
        self._store(Register(boot, version, record, parts, signature, unread))
        return Merge.NEWER

    def _store(self, register: Register) -> None:
        record = register.record
        held = self._registers.get(record.node)
        if held is None or (held.record.claim, held.record.draining) != (record.claim, record.draining):
            self.leader_may_change = True
        self._registers[record.node] = register
        self.highest = max(self.highest, record.claim)


def _decode_parts(data: bytes) -> dict[str, bytes]:
    """Return the fields of a record, each as encoded.

    Raises:
        msgspec.MsgspecError: the data is not a map.
    """
    return {name: bytes(part) for name, part in _parts.decode(data).items()}


def _encode_delta(register: Register, base: int, parts: Mapping[str, bytes]) -> bytes:
    body = encode({name: Raw(part) for name, part in parts.items()})
    node, fields = register.record.node, zlib.compress(body, 1)
    return encode(Delta(node, register.boot, base, register.version, fields, register.signature))
