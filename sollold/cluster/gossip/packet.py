"""What nodes say to each other in datagrams and in push-pulls, and how it is written: msgpack arrays.

A datagram carries several messages of one sender. Decoding is strict: an unknown tag, a missing or an
extra value, a number or a text out of its bounds rejects the whole packet.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

FORMAT = 2
"""2: what a node says of itself is signed by it."""
LIMIT = 1350
"""Most bytes of a packet before it is sealed, so that a datagram has no more than 1,400."""
PUSH_PULL_LIMIT = 16 * 1024 * 1024
"""Most bytes of one push-pull body."""
RECORD_LIMIT = 256 * 1024
"""Most bytes of one node's record."""
MAX_MEMBERS = 4096
"""Nodes known at most, the dead among them: nobody fills the memory with invented names."""
_OVERHEAD = 3

NodeId = Annotated[str, Meta(min_length=16, max_length=16)]
Somebody = Annotated[str, Meta(max_length=16)]
"""A node id, or empty: any node."""
Counter = Annotated[int, Meta(ge=0, lt=2**62)]
"""Incarnations and versions: nobody gets near the bound by counting."""
Boot = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sequence = Annotated[int, Meta(ge=0, lt=2**32)]
Digest = Annotated[int, Meta(ge=0, lt=2**62)]
_Address = tuple[Annotated[str, Meta(min_length=2, max_length=64)], Annotated[int, Meta(ge=1, le=65535)]]
Addresses = Annotated[tuple[_Address, ...], Meta(max_length=8)]
PublicKey = Annotated[bytes, Meta(max_length=32)]
Signature = Annotated[bytes, Meta(max_length=64)]
"""By the node that the message is about, over what `signing` says."""


class Ping(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=1):
    """Do you live? Only ``node`` answers; empty: any node that hears it."""

    sequence: Sequence
    node: Somebody


class PingReq(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=2):
    """Ask ``node`` for me whether it lives."""

    sequence: Sequence
    node: NodeId
    addresses: Addresses


class Ack(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=3):
    """I do (or the one you asked me to ping does). ``digest``: of all that the sender knows."""

    sequence: Sequence
    digest: Digest


class Nack(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=4):
    """I asked for you and heard nothing in time; but I live."""

    sequence: Sequence


class Alive(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=5):
    """``node`` lives. Said and signed by itself; only itself raises the incarnation."""

    node: NodeId
    boot: Boot
    incarnation: Counter
    addresses: Addresses
    key: PublicKey = b""
    signature: Signature = b""


class Suspect(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=6):
    """``by`` heard nothing of ``node``."""

    node: NodeId
    incarnation: Counter
    by: NodeId


class Dead(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=7):
    """``node`` had its time to refute a suspicion, says ``by``."""

    node: NodeId
    incarnation: Counter
    by: NodeId


class Left(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=8):
    """``node`` said goodbye."""

    node: NodeId
    incarnation: Counter
    signature: Signature = b""


class Delta(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=9):
    """Fields of ``node``'s record, for nodes that have a version from ``base`` on. See `registry`.

    ``fields``: zlib-compressed msgpack map; empty when nothing fits a datagram: fetch it.
    """

    node: NodeId
    boot: Boot
    base: Counter
    version: Counter
    fields: bytes
    signature: Signature = b""
    """Over the whole record, not only these fields; empty when there are none."""


Message = Ping | PingReq | Ack | Nack | Alive | Suspect | Dead | Left | Delta


class Packet(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A datagram, opened."""

    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)]
    sender: NodeId
    boot: Boot
    messages: Annotated[list[Message], Meta(max_length=256)]


class MemberState(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What the sender holds of one node. ``status`` as in `membership.Status`.

    ``key`` and ``signature`` are those of its `Alive`; ``farewell`` is the signature of its `Left`.
    """

    node: NodeId
    boot: Boot
    incarnation: Counter
    status: Annotated[int, Meta(ge=0, le=3)]
    addresses: Addresses
    version: Counter
    """Of its record; 0: the sender has none."""
    version_boot: Boot
    key: PublicKey = b""
    signature: Signature = b""
    farewell: Signature = b""
    reached: Addresses = ()
    """Where the sender reaches it, if that is known: a hint that nobody signed."""


class Whole(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One node's record, all of it (a msgpack map)."""

    node: NodeId
    boot: Boot
    version: Counter
    record: Raw
    signature: Signature = b""


class PushPull(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One body of an exchange over TCP. ``stage``: 0 opens, 1 answers, 2 ends it."""

    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)]
    stage: Annotated[int, Meta(ge=0, le=2)]
    sender: NodeId
    boot: Boot
    held: Annotated[list[MemberState], Meta(max_length=MAX_MEMBERS + 1)]
    wanted: Annotated[list[NodeId], Meta(max_length=MAX_MEMBERS + 1)]
    records: Annotated[list[Whole], Meta(max_length=MAX_MEMBERS + 1)]


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_packets = msgspec.msgpack.Decoder(Packet)
_push_pulls = msgspec.msgpack.Decoder(PushPull)


class Rejected(ValueError):
    """Bytes that are no packet, or one that breaks the rules."""


def head(sender: str, boot: int) -> bytes:
    """The beginning of all packets of this sender."""
    return b"\x94" + encode(FORMAT) + encode(sender) + encode(boot)


def compound(head: bytes, messages: list[bytes]) -> bytes:
    """A packet of messages that are encoded already."""
    return b"".join((head, b"\xdc", len(messages).to_bytes(2, "big"), *messages))


def room(head: bytes) -> int:
    """Bytes that messages may take in one packet."""
    return LIMIT - len(head) - _OVERHEAD


def format_of(data: bytes) -> int:
    """The format that what is no packet of ours says it has; 0: none can be read."""
    is_array, is_small = data[:1] and data[0] >> 4 == 9, data[1:2] and data[1] < 0x80
    return data[1] if is_array and is_small else 0


def decode(data: bytes) -> Packet:
    """Read a packet.

    Raises:
        Rejected: it is none.
    """
    if len(data) > LIMIT:
        raise Rejected(f"{len(data)} bytes are more than a packet has")
    try:
        return _packets.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Rejected(str(error)) from error


def decode_push_pull(data: bytes) -> PushPull:
    """Read a push-pull body.

    Raises:
        Rejected: it is none.
    """
    if len(data) > PUSH_PULL_LIMIT:
        raise Rejected(f"{len(data)} bytes are more than a push-pull has")
    try:
        return _push_pulls.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Rejected(str(error)) from error
