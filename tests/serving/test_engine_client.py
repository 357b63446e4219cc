"""HTTP to an engine: responses split anywhere, connection reuse, and invalid HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.cluster.net.http_connection import ResponseLost
from sollold.cluster.net.pour import pulled
from sollold.cluster.net.response_parser import BadResponse, ResponseParser
from sollold.serving.engine_client import EngineClient, EngineUnreachable
from tests.doubles import free_port, until

BODIES = st.lists(st.binary(min_size=1, max_size=40), max_size=12)
CUTS = st.lists(st.integers(0, 3000), max_size=25)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(position % (len(data) + 1) for position in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def in_chunks(parts: list[bytes], trailer: bytes = b"") -> bytes:
    return b"".join(b"%X;x=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailer + b"\r\n"


@given(BODIES, CUTS, st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC: d\r\n"]))
def test_chunked_bodies_survive_any_split(parts: list[bytes], cuts: list[int], trailer: bytes) -> None:
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser = ResponseParser()
    got = [parser.feed(piece) for piece in cut(head + in_chunks(parts, trailer), cuts)]
    assert b"".join(got) == b"".join(parts)
    assert (parser.status, parser.done, parser.keep) == (200, True, True)


@given(st.binary(max_size=200), CUTS)
def test_bodies_with_a_length_survive_any_split(body: bytes, cuts: list[int]) -> None:
    parser = ResponseParser()
    answer = b"HTTP/1.0 503 Busy\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    got = [parser.feed(piece) for piece in cut(answer, cuts)]
    assert b"".join(got) == body
    assert (parser.status, parser.done, parser.keep) == (503, True, False)


@given(st.binary(max_size=300), CUTS, st.booleans())
def test_random_bytes_are_refused_or_incomplete(data: bytes, cuts: list[int], head: bool) -> None:
    parser = ResponseParser()
    before = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if head else b""
    try:
        for piece in cut(before + data, cuts):
            if parser.done:
                break
            parser.feed(piece)
    except BadResponse:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"x" * 70_000,
    ],
)
def test_invalid_http_is_refused(answer: bytes) -> None:
    with pytest.raises(BadResponse):
        ResponseParser().feed(answer)


class Engine:
    """Answers each request with the next of ``answers``; an empty answer closes the connection."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.connections = 0
        self.asked: list[bytes] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                self.asked.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                if not answer:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        self._server.close()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    await made.start()
    yield made
    made.close()


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    made.close()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_connection_is_reused(engine: Engine, client: EngineClient) -> None:
    engine.answers = [CHUNKED + in_chunks([b"one"]), b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\ntwo"]
    assert await client.get(engine.url, "/a", {"X-Key": "k"}) == (200, b"one")
    assert await client.get(engine.url + "/under", "/b", {}) == (404, b"two")
    assert engine.connections == 2
    engine.answers = [CHUNKED + in_chunks([b"three"])]
    assert await client.get(engine.url, "/c", {}) == (200, b"three")
    assert engine.connections == 2
    assert engine.asked[0].startswith(b"GET /a HTTP/1.1\r\n") and b"\r\nX-Key: k\r\n" in engine.asked[0]
    assert engine.asked[1].startswith(b"GET /under/b HTTP/1.1\r\n")


@pytest.mark.parametrize("size", [1, 255 * 1024, 257 * 1024, 2 << 20])
async def test_a_connection_is_reused_after_a_buffered_response(
    engine: Engine, client: EngineClient, size: int
) -> None:
    engine.answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size),
        CHUNKED + in_chunks([b"next"]),
    ]
    connection = await client.connect(engine.url)
    assert await connection.ask("POST", "/", {}, b"") == 200
    # The whole body, or as much as is buffered before it is consumed.
    await until(lambda: connection._size == size or connection._paused)
    assert sum([len(piece) async for piece in pulled(connection.pour)]) == size
    client.release(connection)
    async with asyncio.timeout(10):
        assert await client.get(engine.url, "/", {}) == (200, b"next")
    assert engine.connections == 1


async def test_a_connection_released_in_mid_response_is_closed(engine: Engine, client: EngineClient) -> None:
    engine.answers = [CHUNKED + b"3\r\nabc\r\n", CHUNKED + in_chunks([b"x"])]
    connection = await client.connect(engine.url)
    assert await connection.ask("POST", "/", {}, b"{}") == 200
    assert await anext(pulled(connection.pour)) == b"abc"
    client.release(connection)
    assert client.take_idle(engine.url) is None
    assert await client.get(engine.url, "/", {}) == (200, b"x")
    assert engine.connections == 2


async def test_an_error_in_the_receiver_is_raised(engine: Engine, client: EngineClient) -> None:
    engine.answers = [CHUNKED + b"3\r\nabc\r\n"]
    connection = await client.connect(engine.url)
    await connection.ask("POST", "/", {}, b"")

    def refuse(piece: bytes) -> bool:
        raise LookupError(piece)

    with pytest.raises(LookupError, match="abc"):
        await connection.pour(refuse)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", CHUNKED + b"5\r\nab", b"SSH-2.0-x\r\n\r\n"])
async def test_a_truncated_response_is_an_error(engine: Engine, client: EngineClient, answer: bytes) -> None:
    engine.answers = [answer, b""]
    connection = await client.connect(engine.url)
    asking = asyncio.ensure_future(connection.ask("POST", "/", {}, b""))
    if answer.startswith(CHUNKED):
        assert await asking == 200
        pouring = asyncio.ensure_future(connection.pour(lambda _: True))
        await asyncio.sleep(0)
        connection.close()
        with pytest.raises(ResponseLost):
            await pouring
        return
    if answer == b"HTTP/1.1 200":
        await until(lambda: engine.asked)
        connection.close()
    with pytest.raises(ResponseLost):
        await asking


async def test_an_answer_without_length_ends_with_the_connection(
    engine: Engine, client: EngineClient
) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert await client.get(url, "/", {}) == (200, b"all of it")
    assert client.take_idle(url) is None
    server.close()


async def test_a_closed_port_is_unreachable(client: EngineClient) -> None:
    with pytest.raises(EngineUnreachable):
        await client.connect(f"http://127.0.0.1:{free_port()}")


async def test_unread_data_stops_the_engine(client: EngineClient) -> None:
    sent = 0
    ended = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64000000\r\n\r\n")
        for _ in range(1000):
            writer.write(bytes(64000))
            await writer.drain()
            sent += 64000
        writer.close()
        ended.set()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection = await client.connect(url)
    assert await connection.ask("POST", "/", {}, b"") == 200
    last = -1
    while last != sent:
        last = sent
        await asyncio.sleep(0.1)
    assert not ended.is_set()
    got = 0

    def count(piece: bytes) -> bool:
        nonlocal got
        got += len(piece)
        return True

    async with asyncio.timeout(20):
        assert await connection.pour(count)
    assert got == 64_000_000
    server.close()


async def test_a_connection_with_a_partly_sent_request_is_not_reused() -> None:
    """The engine has answered before it has read the whole body, and then its caller hangs up."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = EngineClient()
    connection = await client.connect(url)
    asking = asyncio.ensure_future(connection.ask("POST", "/", {}, bytes(64 << 20)))
    await until(lambda: connection._parser.done and connection._parser.status == 413)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    client.release(connection)
    assert client.take_idle(url) is None
    client.close()
    server.close()
    await server.wait_closed()
