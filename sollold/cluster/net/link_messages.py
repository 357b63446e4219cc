"""Messages on a standing link between two members: msgpack arrays, each in a frame."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from sollold.cluster.gossip.packet import Boot


class Hello(msgspec.Struct, frozen=True, tag=0, array_like=True):
    """First message from both sides. ``port``: gossip port; ``boot``: boot number of the process."""

    port: Annotated[int, Meta(ge=1, le=65535)]
    boot: Boot


class Ping(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """Requests a `Pong`. Reports measurements: seconds, bytes per second; 0.0: unknown."""

    sequence: int
    trip: float
    rate: float


class Pong(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Response to a `Ping`."""

    sequence: int


class Load(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """One of several pieces sent in a row to measure the transfer rate."""

    data: bytes


class Took(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """Response to a `Load`."""


class Bye(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """Announces that the link is closed on purpose."""


LinkMessage = Hello | Ping | Pong | Load | Took | Bye
_LAST_TAG = 5
_decoder = msgspec.msgpack.Decoder(LinkMessage)


def decode(message: bytes) -> LinkMessage | None:
    """Return a received message; None for one of a kind that only later releases have.

    Raises:
        One of `sollold.undecodable.UNDECODABLE`: it is invalid.
    """
    if len(message) > 1 and message[0] >> 4 == 9 and _LAST_TAG < message[1] < 0x80:
        return None
    decoded: LinkMessage = _decoder.decode(message)
    return decoded
