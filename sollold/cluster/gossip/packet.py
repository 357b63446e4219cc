"""Messages of datagrams and push-pulls, and their encoding: msgpack arrays.

A datagram carries several messages of one sender. Decoding is strict: an unknown tag, a missing or an
extra value, or a number or string out of bounds rejects the whole packet.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

FORMAT = 2
"""Format version. Since 2 a node signs its statements about itself."""
LIMIT = 1350
"""Maximum bytes of a packet before it is sealed, so that a datagram has at most 1,400."""
PUSH_PULL_LIMIT = 16 * 1024 * 1024
"""Maximum bytes of one push-pull body."""
RECORD_LIMIT = 256 * 1024
"""Maximum bytes of one node's record."""
MAX_MEMBERS = 4096
"""Maximum number of known nodes, including dead ones: invented node ids must not exhaust memory."""
_OVERHEAD = 3

NodeId = Annotated[str, Meta(min_length=16, max_length=16)]
Somebody = Annotated[str, Meta(max_length=16)]
"""A node id, or empty: any node."""
Counter = Annotated[int, Meta(ge=0, lt=2**62)]
"""Incarnations and versions; counting never reaches the bound."""
Boot = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sequence = Annotated[int, Meta(ge=0, lt=2**32)]
Digest = Annotated[int, Meta(ge=0, lt=2**62)]
_Address = tuple[Annotated[str, Meta(min_length=2, max_length=64)], Annotated[int, Meta(ge=1, le=65535)]]
Addresses = Annotated[tuple[_Address, ...], Meta(max_length=8)]
PublicKey = Annotated[bytes, Meta(max_length=32)]
Signature = Annotated[bytes, Meta(max_length=64)]
"""Signature by the node that the message is about; see `signing` for the signed content."""


class Ping(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=1):
    """Asks for an `Ack`. Only ``node`` responds; empty: any node that receives it."""

    sequence: Sequence
    node: Somebody


class PingReq(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=2):
    """Asks the receiver to ping ``node`` on the sender's behalf."""

    sequence: Sequence
    node: NodeId
    addresses: Addresses


class Ack(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=3):
    """The sender is alive (or the node it was asked to ping is). ``digest``: of all that the sender knows."""

    sequence: Sequence
    digest: Digest


class Nack(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=4):
    """The pinged node did not respond in time; but the sender is alive."""

    sequence: Sequence


class Alive(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=5):
    """``node`` is alive. Made and signed by ``node`` itself, which alone raises the incarnation."""

    node: NodeId
    boot: Boot
    incarnation: Counter
    addresses: Addresses
    key: PublicKey = b""
    signature: Signature = b""


class Suspect(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=6):
    """``by`` got no response from ``node``."""

    node: NodeId
    incarnation: Counter
    by: NodeId


class Dead(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=7):
    """``by`` states that ``node`` failed to refute a suspicion in time."""

    node: NodeId
    incarnation: Counter
    by: NodeId


class Left(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=8):
    """``node`` left the cluster."""

    node: NodeId
    incarnation: Counter
    signature: Signature = b""


class Delta(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag=9):
    """Fields of ``node``'s record, for nodes that have version ``base`` or a later one. See `registry`.

    ``fields``: zlib-compressed msgpack map; empty if no field fits a datagram: fetch the record.
    """

    node: NodeId
    boot: Boot
    base: Counter
    version: Counter
    fields: Annotated[bytes, Meta(max_length=LIMIT)]
    signature: Signature = b""
    """Covers the whole record, not only these fields; empty if there are no fields."""


Message = Ping | PingReq | Ack | Nack | Alive | Suspect | Dead | Left | Delta


class Packet(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A decrypted datagram."""

    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)]
    sender: NodeId
    boot: Boot
    messages: Annotated[list[Message], Meta(max_length=256)]


class MemberState(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The sender's view of one node. ``status``: a `member.Status`.

    ``key`` and ``signature`` are those of its `Alive`; ``farewell`` is the signature of its `Left`.
    """

    node: NodeId
    boot: Boot
    incarnation: Counter
    status: Annotated[int, Meta(ge=0, le=3)]
    addresses: Addresses
    version: Counter
    """Version of the node's record; 0: the sender has none."""
    version_boot: Boot
    key: PublicKey = b""
    signature: Signature = b""
    farewell: Signature = b""
    reached: Addresses = ()
    """Address at which the sender reaches it, if known: an unsigned hint."""


class Whole(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One node's complete record (a msgpack map)."""

    node: NodeId
    boot: Boot
    version: Counter
    record: Raw
    signature: Signature = b""


class PushPull(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One body of an exchange over TCP. ``stage``: 0 opens, 1 responds, 2 ends it."""

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
    """The bytes are not a valid packet."""


def head(sender: str, boot: int) -> bytes:
    """Return the start of all packets of this sender."""
    return b"\x94" + encode(FORMAT) + encode(sender) + encode(boot)


def compound(head: bytes, messages: list[bytes]) -> bytes:
    """Return a packet of encoded messages."""
    return b"".join((head, b"\xdc", len(messages).to_bytes(2, "big"), *messages))


def room(head: bytes) -> int:
    """Return the bytes available for messages in one packet."""
    return LIMIT - len(head) - _OVERHEAD


def format_of(data: bytes) -> int:
    """Return the format number in bytes that are not a valid packet; 0 if there is none."""
    is_array, is_small = data[:1] and data[0] >> 4 == 9, data[1:2] and data[1] < 0x80
    return data[1] if is_array and is_small else 0


def decode(data: bytes) -> Packet:
    """Decode a packet.

    Raises:
        Rejected: the bytes are not a valid packet.
    """
    if len(data) > LIMIT:
        raise Rejected(f"a packet of {len(data)} bytes; the limit is {LIMIT}")
    try:
        return _packets.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Rejected(str(error)) from error


def decode_push_pull(data: bytes) -> PushPull:
    """Decode a push-pull body.

    Raises:
        Rejected: the bytes are not a valid body.
    """
    if len(data) > PUSH_PULL_LIMIT:
        raise Rejected(f"a push-pull of {len(data)} bytes; the limit is {PUSH_PULL_LIMIT}")
    try:
        return _push_pulls.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Rejected(str(error)) from error
