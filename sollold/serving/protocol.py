"""The wire format of requests and responses between the node that got the request and the endpoint's node.

The request is one msgpack `EngineRequest`. The response is a sequence of frames: one byte for the kind, four
bytes of length (big-endian), the payload. Kinds, in the order in which they may occur::

    q*  position in the queue (msgpack int)
    b   the engine has begun to respond: msgpack `ResponseHead`
    d*  bytes of the engine's body, as they arrived
    e   the body is complete         or  x  it broke off: msgpack `StreamError`

``k`` (keep-alive, no payload) may occur anywhere. A response without a final ``e`` or ``x`` was cut off.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from sollold.cluster.net.pieces import PIECE, copied

PATH = "/serve"
"""The peer route."""
LARGEST_REQUEST = 512 * 1024 * 1024
"""Maximum size of a request, in bytes; images make requests big."""
LARGEST_FRAME = 256 * 1024 * 1024
"""Maximum payload of one frame, in bytes."""

POSITION = ord("q")
BEGUN = ord("b")
DATA = ord("d")
END = ord("e")
BROKEN = ord("x")
ALIVE = ord("k")

_HEAD = struct.Struct(">BI")


class Trial(msgspec.Struct, frozen=True):
    """How a request with which an engine crashed is tried again: see `sollold.serving.suspects`.

    ``id``: its id in the crashed engine; ``after``: those of the other suspects if it is the likeliest cause,
    which is tried last; otherwise empty.
    """

    id: str
    after: tuple[str, ...] = ()


class EngineRequest(msgspec.Struct, frozen=True):
    """A request for an endpoint.

    Attributes:
        id: the request's id, in the logs of both nodes.
        path: path on the engine's HTTP API; ``body``: the JSON to send there.
        age: seconds since the request arrived at the sending node; they count as waiting time in the queue.
        deadline: seconds left; 0: none.
        keep_alive: seconds to keep the model loaded when idle afterwards; negative: forever; None: not set.
        bypass_queue: a small request (such as a token count) that need not wait for a slot.
        suspect: an engine crashed with this and other unanswered requests; at most one such request at a time
            is unanswered in an engine.
        trial: the same, if known which other requests these are.
        trace: `sollold.tracing.traceparent` of the sender; empty: not traced.
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
    suspect: bool = False
    trial: Trial | None = None
    trace: str = ""


def request_parts(request: EngineRequest) -> tuple[bytes, bytes]:
    """Encode a request as msgpack in two parts; the second is its body, which is not copied."""
    fields = {name: getattr(request, name) for name in EngineRequest.__struct_fields__ if name != "body"}
    head = bytearray(msgspec.msgpack.encode(fields))
    # A map of up to 15 entries has its size in its first byte; the body becomes the last entry, as bin 32.
    head[0] += 1
    return bytes(head + b"\xa4body\xc6" + len(request.body).to_bytes(4, "big")), request.body


async def read_request(raw: bytes) -> EngineRequest:
    """Decode a request. The body of a large one is copied piece by piece, to keep the loop responsive.

    Raises:
        msgspec.MsgspecError: ``raw`` is not a valid request.
    """
    if len(raw) <= PIECE:
        return msgspec.msgpack.decode(raw, type=EngineRequest)
    fields = msgspec.msgpack.decode(raw, type=dict[str, msgspec.Raw])
    body = memoryview(fields.get("body", b""))
    head = msgspec.msgpack.encode({**fields, "body": b""})
    request = msgspec.msgpack.decode(head, type=EngineRequest)
    if body[:1].tobytes() != b"\xc6":
        return msgspec.msgpack.decode(raw, type=EngineRequest)
    return msgspec.structs.replace(request, body=await copied(body[5:]))


class ResponseHead(msgspec.Struct, frozen=True):
    """The engine's HTTP status, and the time from the request's arrival to its slot, in milliseconds.

    ``alone``: no other request was in the engine with it.
    """

    status: int
    queue_ms: float = 0.0
    alone: bool = True


class ErrorKind(StrEnum):
    """Why an endpoint did not answer, or not completely."""

    FULL = "full"
    """The queue is full; ``retry_after``."""
    MOVED = "moved"
    """The endpoint takes no work here (draining, unloaded, unknown): try elsewhere."""
    ENGINE = "engine"
    """The engine died, hung, or is unreachable."""
    DEADLINE = "deadline"
    """The request's time limit has passed."""


@dataclass(eq=False)
class StreamError(Exception):
    """An endpoint did not answer, or not completely. Sent between nodes unchanged.

    ``transport``: the node or the engine could not be reached or the connection broke, which a circuit
    breaker counts. ``taken``: the engine had the request when it failed. ``crashed``: a process of the engine
    crashed because of this request, for which it had produced nothing; ``suspect``, ``trial``: because of
    this or another such request. ``forced``: the engine was unloaded by force with all its requests, so this
    request is not retried on another engine.
    """

    kind: ErrorKind
    message: str
    retry_after: float = 0.0
    transport: bool = False
    taken: bool = False
    crashed: bool = False
    suspect: bool = False
    forced: bool = False
    trial: Trial | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)


class BadFrame(ValueError):
    """The received bytes are not a sequence of frames."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Encode a frame: its kind and its length, then the payload."""
    return _HEAD.pack(kind, len(payload)) + payload


def packed(kind: int, fact: object) -> bytes:
    """Encode a frame whose payload is ``fact`` as msgpack."""
    return frame(kind, msgspec.msgpack.encode(fact))


class Frames:
    """Splits a stream of bytes into frames, in whatever pieces it arrives."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Add received bytes and return the frames that are complete now.

        Raises:
            BadFrame: a frame is longer than `LARGEST_FRAME`.
        """
        if self._rest:
            data = self._rest + data
        start, end = 0, len(data)
        frames: list[tuple[int, bytes]] = []
        while end - start >= 5:
            kind, length = _HEAD.unpack_from(data, start)
            if length > LARGEST_FRAME:
                raise BadFrame(f"a frame of {length} bytes, which exceeds the limit")
            stop = start + 5 + length
            if stop > end:
                break
            frames.append((kind, data[start + 5 : stop]))
            start = stop
        self._rest = data[start:]
        return frames
