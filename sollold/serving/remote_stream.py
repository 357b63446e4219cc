"""Streams the response of an endpoint on another node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import msgspec

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.http_connection import HttpConnection, ResponseLost
from sollold.cluster.net.pour import Receiver
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.serving.protocol import (
    BEGUN,
    BROKEN,
    DATA,
    END,
    PATH,
    POSITION,
    BadFrame,
    EngineRequest,
    ErrorKind,
    Frames,
    ResponseHead,
    StreamError,
    request_parts,
)
from sollold.undecodable import UNDECODABLE

_CONNECT_SECONDS = 3.0
"""Timeout for connecting to the endpoint's node, in seconds."""
_SILENCE_SECONDS = 7.0
"""Seconds without data after which the endpoint's node counts as dead; it sends a frame every 2 s."""
_CONNECTION_ERRORS = (OSError, TimeoutError, PeerError, *UNDECODABLE)
_HEADERS = {"Content-Type": "application/msgpack"}


class RemoteStream:
    """A `Stream` from an engine on another node."""

    def __init__(self, calls: RpcClient, record: Record, request: EngineRequest) -> None:
        self.head: ResponseHead | None = None
        self._calls = calls
        self._node = record.node
        self._name = record.name
        self._request = request
        self._connection: HttpConnection | None = None
        self._frames = Frames()
        self._early: list[tuple[int, bytes]] = []
        """Frames that arrived together with the head."""
        self._paused = False
        """Whether the receiver wants no more for now."""
        self._end = 0
        """Kind of the frame that ended the body, END or BROKEN; 0 before."""
        self._last = b""
        """Payload of that frame."""
        self._error: StreamError | None = None

    async def open(self, on_position: Callable[[int], None], *, wait: bool = True) -> None:
        """Send the request to the endpoint's node, wait in its queue, and read the engine's status.

        ``wait`` False: return as soon as the request is queued; `head` is then None, and a second call waits.

        Raises:
            StreamError: as its kind says.
        """
        try:
            await self._open(on_position, wait)
        except _CONNECTION_ERRORS as error:
            await self.close()
            raise self._lost(error) from None
        except BaseException:
            await self.close()
            raise

    async def _open(self, on_position: Callable[[int], None], wait: bool) -> None:
        connection = self._connection or await self._sent()

        def receive(data: bytes) -> bool:
            frames, read_on = self._feed(data), True
            for index, (kind, payload) in enumerate(frames):
                if kind == POSITION:
                    on_position(msgspec.msgpack.decode(payload, type=int))
                    read_on = wait
                elif kind == BROKEN:
                    raise msgspec.msgpack.decode(payload, type=StreamError)
                elif kind == BEGUN:
                    self.head = msgspec.msgpack.decode(payload, type=ResponseHead)
                    self._early = frames[index + 1 :]
                    return False
            return read_on

        if await connection.pour(receive) and self.head is None:
            raise self._closed()

    async def _sent(self) -> HttpConnection:
        """Send the request on a connection, and return that."""
        connection = self._connection = await self._calls.connect(self._node, timeout=_CONNECT_SECONDS)
        connection.silence = _SILENCE_SECONDS
        status = await connection.ask("POST", PATH, _HEADERS, *request_parts(self._request))
        if status != 200:
            raise StreamError(ErrorKind.ENGINE, f"{self._name} answered {status}")
        return connection

    async def pour(self, receive: Receiver[bytes]) -> bool:
        """Pass on the body in pieces.

        Raises:
            StreamError: the stream broke off.
        """
        connection = self._connection
        assert connection is not None
        frames, self._early, self._paused = self._early, [], False
        if not self._end and self._pass(frames, receive):
            try:
                await connection.pour(lambda data: self._pass(self._feed(data), receive))
            except ResponseLost as error:
                raise self._lost(error) from None
        if self._paused:
            return False
        if not self._end:
            raise self._closed()
        with contextlib.suppress(ResponseLost, *UNDECODABLE):
            if self._end == BROKEN:
                raise msgspec.msgpack.decode(self._last, type=StreamError)
            # Read to the very end, so that the connection can be reused.
            await connection.pour(lambda _: True)
            return True
        if self._end == BROKEN:
            raise self._broken(f"{self._name} sent an error that can't be read")
        return True

    def _pass(self, frames: list[tuple[int, bytes]], receive: Receiver[bytes]) -> bool:
        """Pass on the part of the body in ``frames``. Return whether to read on."""
        body, end, payload = _body_in(frames)
        if end:
            self._end, self._last = end, payload
        self._paused = bool(body) and not receive(body)
        return not (self._paused or end)

    def abort(self, error: StreamError) -> None:
        """Break off the stream, such as when the endpoint's node is gone. Its reader gets ``error``."""
        self._error = replace(error, transport=error.kind is ErrorKind.ENGINE)
        if self._connection is not None:
            self._connection.close()

    async def close(self) -> None:
        """Close the connection, or keep it for reuse if the response was read to its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._calls.release(connection)

    def _feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Add received bytes and return the frames that are complete now."""
        try:
            return self._frames.feed(data)
        except BadFrame as error:
            raise self._broken(f"{self._name} sent {error}") from None

    def _closed(self) -> StreamError:
        return self._error or self._broken(f"{self._name} closed the connection")

    def _lost(self, error: BaseException) -> StreamError:
        reason = str(error) or type(error).__name__
        return self._error or self._broken(f"connection to {self._name} lost: {reason}")

    def _broken(self, message: str) -> StreamError:
        return StreamError(ErrorKind.ENGINE, message, transport=True)


def _body_in(frames: list[tuple[int, bytes]]) -> tuple[bytes, int, bytes]:
    """Return the body's bytes in ``frames``, the kind of the frame that ends it (0: none) and its payload."""
    if len(frames) == 1 and frames[0][0] == DATA:
        return frames[0][1], 0, b""
    parts: list[bytes] = []
    for kind, payload in frames:
        if kind == DATA:
            parts.append(payload)
        elif kind in (END, BROKEN):
            return b"".join(parts), kind, payload
    return b"".join(parts), 0, b""
