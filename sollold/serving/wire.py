"""How a request and its answer travel between the node asked and the endpoint's node.

The request is one msgpack `Turn`. The answer is a row of frames: one byte that names the kind, four bytes
of length (big-endian), the payload. Kinds, in the order they may come::

    q*  place in line (msgpack int)
    b   the engine has begun to answer: msgpack `Begun`
    d*  bytes of the engine's body, as they came
    e   the body is whole            or  x  it broke off: msgpack `Broken`

``k`` (nothing; "still here") may stand anywhere. An answer that ends without ``e`` or ``x`` was cut.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

import msgspec

PATH = "/serve"
"""The peer route."""
LARGEST_TURN = 512 * 1024 * 1024
"""Bytes of a request that are taken at the most; images make requests big."""
LARGEST_FRAME = 256 * 1024 * 1024
"""Bytes of one frame that are taken at the most."""

POSITION = ord("q")
BEGUN = ord("b")
DATA = ord("d")
END = ord("e")
BROKEN = ord("x")
ALIVE = ord("k")

_HEAD = struct.Struct(">BI")


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked of an endpoint.

    Attributes:
        id: the request's, in logs on both nodes.
        path: on the engine's HTTP API; ``body``: the JSON to send there.
        age: seconds it has waited elsewhere already: it keeps its place in line.
        deadline: seconds left; 0: none.
        keep_alive: seconds of idleness after it; negative: for ever; None: not named.
        aside: a small question (token counts) that needs no turn.
    """

    id: str
    endpoint: str
    path: str
    body: bytes
    stream: bool = True
    priority: int = 5
    client: str = ""
    age: float = 0.0
    deadline: float = 0.0
    keep_alive: float | None = None
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine's status, and the milliseconds that the request stood in line."""

    status: int
    queue_ms: float = 0.0


class Break(StrEnum):
    """Why an endpoint could not answer, or not to the end."""

    FULL = "full"
    """The line is full; ``retry_after``."""
    MOVED = "moved"
    """The endpoint takes no new work here (draining, unloaded, not known): ask elsewhere."""
    ENGINE = "engine"
    """The engine died, hung, or can't be reached."""
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Broken:
    """Why there is no (more) answer. ``inside``: an engine had the request, and may have died of it."""

    kind: Break
    message: str
    retry_after: float = 0.0
    inside: bool = False


class BadFrame(ValueError):
    """What came is not a row of frames."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def packed(kind: int, fact: object) -> bytes:
    """One frame whose payload is msgpack."""
    return frame(kind, msgspec.msgpack.encode(fact))


class Frames:
    """Cuts a row of bytes into frames, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that are whole now.

        Raises:
            BadFrame: a frame is longer than `LARGEST_FRAME`.
        """
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        frames: list[tuple[int, bytes]] = []
        while end - at >= 5:
            kind, length = _HEAD.unpack_from(data, at)
            if length > LARGEST_FRAME:
                raise BadFrame(f"a frame of {length} bytes")
            stop = at + 5 + length
            if stop > end:
                break
            frames.append((kind, data[at + 5 : stop]))
            at = stop
        self._rest = data[at:]
        return frames
