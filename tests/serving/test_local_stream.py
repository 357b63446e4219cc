"""A request on the endpoint's node: cancelled before it reaches the engine, and answered in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from sollold.cluster.net.http_connection import HttpConnection
from sollold.cluster.net.pour import Receiver
from sollold.engines.address import EngineAddress
from sollold.errors import Refusal
from sollold.serving.admission import AdmissionQueue
from sollold.serving.engine_client import EngineClient
from sollold.serving.local_stream import LocalStream
from sollold.serving.protocol import EngineRequest, ErrorKind, StreamError
from sollold.serving.stream import whole
from tests.doubles import until


class Unreachable:
    """An engine that never completes a connection; counts users and connection attempts."""

    def __init__(self) -> None:
        self.users = 0
        self.connecting = 0

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def address(self, endpoint: str) -> EngineAddress:
        return EngineAddress("http://192.0.2.1:1", "")

    def take_idle(self, url: str) -> HttpConnection | None:
        return None

    async def connect(self, url: str) -> HttpConnection:
        self.connecting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.connecting -= 1
        raise AssertionError


class Answered(Unreachable):
    """An engine whose answer arrives in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__()
        self.pieces = list(pieces)
        self.asked = False
        self.connected = asyncio.Event()
        self.connected.set()

    async def connect(self, url: str) -> HttpConnection:
        self.connecting += 1
        await self.connected.wait()
        return cast(HttpConnection, self)

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> int:
        self.asked = True
        return 200

    async def pour(self, receive: Receiver[bytes]) -> bool:
        while self.pieces:
            if not receive(self.pieces.pop(0)):
                return False
        return True

    def close(self) -> None:
        self.pieces.clear()


def local_stream(
    engine: Unreachable, queue: AdmissionQueue, on_end: Callable[[LocalStream], None] = lambda stream: None
) -> LocalStream:
    return LocalStream(
        EngineRequest("r", "d", "/v1/chat/completions", b"{}", True),
        queue,
        cast(Any, engine),
        cast(EngineClient, engine),
        stall=10.0,
        speed=0.0,
        on_speed=lambda stream, figures: None,
        on_end=on_end,
        suspects=lambda: (),
    )


async def test_abort_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    assert engine.users == queue.active == 1
    stream.abort(StreamError(ErrorKind.MOVED, "the node is drained"))
    with pytest.raises(StreamError, match="the node is drained"):
        await asyncio.wait_for(opening, 5)
    assert engine.connecting == engine.users == queue.active == 0


async def test_second_abort_while_the_first_takes_effect() -> None:
    """As when an engine that hangs is ended: the change of the record follows in the loop's next turn."""
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    stream.abort(StreamError(ErrorKind.ENGINE, "the engine hangs"))
    await asyncio.sleep(0)
    stream.abort(StreamError(ErrorKind.ENGINE, "the engine was ended"))
    await stream.close()
    with pytest.raises(StreamError, match="the engine was ended"):
        await asyncio.wait_for(opening, 5)
    assert engine.connecting == engine.users == queue.active == 0


@pytest.mark.parametrize("closed", [False, True])
async def test_a_request_aborted_as_its_connection_is_made_is_not_sent(closed: bool) -> None:
    engine, queue = Answered(b"data: 1\n\n"), AdmissionQueue(1, 1)
    engine.connected.clear()
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    engine.connected.set()
    stream.abort(StreamError(ErrorKind.MOVED, "the node is drained"))
    if closed:
        await stream.close()
    with pytest.raises(StreamError, match="the node is drained"):
        await asyncio.wait_for(opening, 5)
    assert not engine.pieces and not engine.asked and engine.users == queue.active == 0


async def test_caller_cancels_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    opening = asyncio.ensure_future(local_stream(engine, queue).open(lambda position: None))
    await until(lambda: engine.connecting)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert engine.connecting == engine.users == queue.active == 0


async def test_close_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    await stream.close()
    with pytest.raises(StreamError, match="cancelled"):
        await asyncio.wait_for(opening, 5)
    assert engine.connecting == engine.users == queue.active == 0


async def test_an_aborted_stream_releases_its_slot_although_its_caller_does_not_read() -> None:
    engine, queue = Answered(b"data: 1\n\n", b"data: 2\n\n"), AdmissionQueue(1, 1)
    ended: list[LocalStream] = []
    stream = local_stream(engine, queue, ended.append)
    await stream.open(lambda position: None)
    assert not await stream.pour(lambda piece: False)
    stream.abort(StreamError(ErrorKind.DEADLINE, "the deadline passed"))
    assert engine.users == queue.active == 0
    with pytest.raises(StreamError, match="the deadline passed"):
        await stream.pour(lambda piece: True)
    await stream.close()
    assert ended == [stream]


async def test_an_answer_that_is_too_long_is_refused_instead_of_generated_again() -> None:
    stream = local_stream(Answered(b"12345", b"67890", b"1"), AdmissionQueue(1, 1))
    await stream.open(lambda position: None)
    with pytest.raises(Refusal, match="longer than 10 bytes"):
        await whole(stream, limit=10)
    await stream.close()


async def received(*pieces: bytes) -> bytes:
    """Return what a stream passes on of an engine's answer."""
    stream = local_stream(Answered(*pieces), AdmissionQueue(1, 1))
    out = bytearray()

    def receive(piece: bytes) -> bool:
        out.extend(piece)
        return True

    await stream.open(lambda position: None)
    assert await stream.pour(receive)
    await stream.close()
    return bytes(out)


@pytest.mark.parametrize(
    "pieces",
    [
        (b'{"data"', b': [{"embedding"', b":[1.5]}]}"),
        (b'data: {"content"', b':"a"}\n\n'),
        (b"data: 1\n\n", b": ping\n\nda", b"ta: 2\n\n"),
        (b"data: 1\n\n", b": pi", b"ng\n\n"),
    ],
)
async def test_a_piece_that_begins_with_a_colon_is_passed_on(pieces: tuple[bytes, ...]) -> None:
    assert await received(*pieces) == b"".join(pieces)


async def test_comments_are_dropped() -> None:
    assert await received(b":\n\n", b"data: 1\n\n", b": ping\n\n:\n\n", b"data: 2\n\n") == (
        b"data: 1\n\ndata: 2\n\n"
    )
