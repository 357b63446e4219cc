"""Data that is ready together is sent in one write, since each write wakes the peer and is a TLS record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from sollold.cluster.net.http_connection import HttpConnection
from sollold.cluster.net.pieces import PIECE
from sollold.serving.body_writer import BodyWriter, StreamedResponse
from sollold.serving.peer_handler import PeerCaller
from sollold.serving.protocol import BEGUN, DATA, END, ResponseHead, frame, packed
from tests.doubles import until


class Written(asyncio.Transport):
    """A transport that records each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


async def request_writes(*body: bytes) -> list[bytes]:
    connection, transport = HttpConnection("there"), Written()
    connection.connection_made(transport)
    asking = asyncio.ensure_future(connection.ask("POST", "/", {}, *body))
    await until(lambda: sum(map(len, transport.writes)) > sum(map(len, body)))
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert await asking == 200
    return transport.writes


async def test_a_small_request_is_one_write() -> None:
    (sent,) = await request_writes(b"head", b"body")
    assert sent.startswith(b"POST / HTTP/1.1\r\n") and sent.endswith(b"Content-Length: 8\r\n\r\nheadbody")


async def test_a_large_request_is_not_copied() -> None:
    body = b"x" * (3 * PIECE)
    first, *rest = await request_writes(b"head", body)
    assert first.endswith(b"\r\n\r\n") and b"".join(rest) == b"head" + body
    assert max(map(len, rest)) <= PIECE


async def writes_by(
    act: Callable[[BodyWriter], Awaitable[object]], last: bytes, *, hold: bool
) -> tuple[list[bytes], list[bytes]]:
    """Return the socket's writes up to the end of ``act``, and all until the body's end with ``last``."""
    written: list[bytes] = []
    before: list[bytes] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        transport = cast(Any, request.transport)
        protocol = cast(Any, request.protocol)

        class Noting:
            def write(self, data: bytes) -> None:
                written.append(bytes(data))
                transport.write(data)

            def writelines(self, parts: list[bytes]) -> None:
                self.write(b"".join(parts))

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        protocol.transport = Noting()
        response = StreamedResponse()
        writer = await BodyWriter.begin(request, response, hold=hold)
        await act(writer)
        before.extend(written)
        # aiohttp then ends the response once more, which writes nothing.
        await writer.write_eof(last)
        return response

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client, client.get("/") as answer:
        await answer.read()
    return before, written


async def writes_of(parts: list[bytes], last: bytes, *, hold: bool, later: bool) -> list[bytes]:
    """Return the socket's writes for a body in ``parts``. ``later``: after a few loop iterations."""

    async def write(writer: BodyWriter) -> None:
        if later:
            await loop_turns()
        for part in parts:
            assert writer.write(part)

    _, written = await writes_by(write, last, hold=hold)
    assert b"".join(map(body_of, written)) == b"".join(parts) + last + b"<end>"
    return written


async def loop_turns() -> None:
    """Wait a few iterations of the event loop."""
    for _ in range(3):
        await asyncio.sleep(0)


def body_of(write: bytes) -> bytes:
    """Return the part of the body in one write, with ``<end>`` for its end."""
    rest = write.partition(b"\r\n\r\n")[2] if write.startswith(b"HTTP/1.1 ") else write
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length] or b"<end>"
        rest = rest[length + 2 :]
    return body


async def test_headers_leave_with_the_first_part_and_the_end_with_the_last() -> None:
    first, second, last = await writes_of([b"one", b"two"], b"three", hold=False, later=False)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n") and first.endswith(b"\r\n\r\n3\r\none\r\n")
    assert (second, last) == (b"3\r\ntwo\r\n", b"5\r\nthree\r\n0\r\n\r\n")


async def test_headers_wait_for_later_data_only_if_held() -> None:
    alone, first, _ = await writes_of([b"one"], b"end", hold=False, later=True)
    assert alone.endswith(b"\r\n\r\n") and first == b"3\r\none\r\n"
    together, _ = await writes_of([b"one"], b"end", hold=True, later=True)
    assert together.endswith(b"\r\n\r\n3\r\none\r\n")


BEGINNING = packed(BEGUN, ResponseHead(200, 0.0))


async def frames_of(act: Callable[[PeerCaller], Awaitable[object]]) -> list[bytes]:
    """Return the frames sent to a caller's node when an engine begins and ``act`` follows."""

    async def begin(writer: BodyWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        caller = PeerCaller("there", writer, task)
        caller.begin(ResponseHead(200, 0.0))
        await act(caller)
        await loop_turns()

    before, _ = await writes_by(begin, b"", hold=True)
    return [body_of(write) for write in before]


async def test_the_begin_frame_is_sent_once_with_the_first_data() -> None:
    async def says(caller: PeerCaller) -> None:
        caller.pass_on(b"one")
        caller.pass_on(b"two")
        await caller.write_last(frame(END))

    frames = [frame(DATA, b"one"), frame(DATA, b"two"), frame(END)]
    assert await frames_of(says) == [BEGINNING + frames[0], frames[1], frames[2] + b"<end>"]
    assert await frames_of(lambda caller: caller.write_last(frame(END))) == [
        BEGINNING + frame(END) + b"<end>"
    ]
    assert await frames_of(lambda caller: asyncio.sleep(0)) == [BEGINNING], (
        "the beginning does not wait for more"
    )


async def test_an_answer_in_one_piece_leaves_in_one_write() -> None:
    async def says(caller: PeerCaller) -> None:
        assert caller.pass_on_together(b"one") and caller.pass_on_together(b"two")
        await caller.write_last(frame(END))

    whole = BEGINNING + frame(DATA, b"one") + frame(DATA, b"two") + frame(END) + b"<end>"
    assert await frames_of(says) == [whole]


async def test_the_begin_frame_precedes_data_too_long_for_one_write() -> None:
    async def says(caller: PeerCaller) -> None:
        assert not caller.pass_on(b"x" * (2 * PIECE))
        caller.show_life()
        await caller.drain()

    async def waits(caller: PeerCaller) -> None:
        await loop_turns()
        await says(caller)

    expected = BEGINNING + frame(DATA, b"x" * (2 * PIECE))
    assert b"".join(await frames_of(says)) == b"".join(await frames_of(waits)) == expected


async def test_an_answer_without_a_body_is_one_write() -> None:
    (whole,) = await writes_of([], b"", hold=False, later=False)
    assert whole.endswith(b"\r\n\r\n0\r\n\r\n")
