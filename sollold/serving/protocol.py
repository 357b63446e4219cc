"""How a request and its answer travel between the node that was asked and the endpoint's node.

The request is one msgpack `EngineRequest`. The answer is a sequence of frames: one byte that names the
kind, four bytes of length (big-endian), the payload. Kinds, in the order they may come::

    q*  place in the queue (msgpack int)
    b   the engine has begun to answer: msgpack `ResponseHead`
    d*  bytes of the engine's body, as they came
    e   the body is whole            or  x  it broke off: msgpack `StreamError`

``k`` (nothing; "still here") may stand anywhere. An answer that ends without ``e`` or ``x`` was cut.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from sollold.cluster.net.pieces import PIECE, copied

PATH = "/serve"
"""The peer route."""
LARGEST_REQUEST = 512 * 1024 * 1024
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
class EngineRequest:
    """A request for an endpoint.

    Attributes:
        id: the request's, in logs on both nodes.
        path: on the engine's HTTP API; ``body``: the JSON to send there.
        age: seconds it has waited elsewhere already: it keeps its place in the queue.
        deadline: seconds left; 0: none.
        keep_alive: seconds of idleness after it; negative: for ever; None: not named.
        bypass_queue: a small request (token counts) that need not wait for a slot.
        trace: `sollold.tracing.traceparent` where it was sent; empty: not traced.
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
    bypass_queue: bool = False
    trace: str = ""


def request_parts(request: EngineRequest) -> tuple[bytes, bytes]:
    """The msgpack of a request in two parts, of which the second is its body: that is not copied."""
    known = {name: getattr(request, name) for name in EngineRequest.__slots__ if name != "body"}
    head = bytearray(msgspec.msgpack.encode(known))
    # A map of up to 15 has its size in its first byte; the body is the last of it, as bytes of any length.
    head[0] += 1
    return bytes(head + b"\xa4body\xc6" + len(request.body).to_bytes(4, "big")), request.body


async def read_request(raw: bytes) -> EngineRequest:
    """The request in ``raw``. A large one is copied a piece at a time.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    if len(raw) <= PIECE:
        return msgspec.msgpack.decode(raw, type=EngineRequest)
    fields = msgspec.msgpack.decode(raw, type=dict[str, msgspec.Raw])
    body = memoryview(fields.get("body", b""))
    known = msgspec.msgpack.encode({**fields, "body": b""})
    request = msgspec.msgpack.decode(known, type=EngineRequest)
    if body[:1].tobytes() != b"\xc6":
        return msgspec.msgpack.decode(raw, type=EngineRequest)
    return replace(request, body=await copied(body[5:]))


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The engine's status, and the milliseconds that the request was queued."""

    status: int
    queue_ms: float = 0.0


class ErrorKind(StrEnum):
    """Why an endpoint could not answer, or not to the end."""

    FULL = "full"
    """The queue is full; ``retry_after``."""
    MOVED = "moved"
    """The endpoint takes no new work here (draining, unloaded, not known): ask elsewhere."""
    ENGINE = "engine"
    """The engine died, hung, or can't be reached."""
    DEADLINE = "deadline"
    """The time that the request allows is over."""


@dataclass(eq=False)
class StreamError(Exception):
    """An endpoint gave no answer, or not to the end. It travels between nodes as it is.

    ``transport``: the node or the engine could not be reached or the connection broke, which a circuit
    breaker counts. ``taken``: the engine had the request in it when it failed. ``crashed``: a process of the
    engine ended by a fault of its own, before anything came of this request, the newest in it. ``forced``:
    somebody ended the engine with all requests in it: no other is to be found or loaded for this one.
    """

    kind: ErrorKind
    message: str
    retry_after: float = 0.0
    transport: bool = False
    taken: bool = False
    crashed: bool = False
    forced: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.message)


class BadFrame(ValueError):
    """What came is not a sequence of frames."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame: its kind and its length, then the payload."""
    return _HEAD.pack(kind, len(payload)) + payload


def packed(kind: int, fact: object) -> bytes:
    """One frame whose payload is msgpack."""
    return frame(kind, msgspec.msgpack.encode(fact))


class Frames:
    """Cuts a stream of bytes into frames, whatever pieces it comes in."""

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
