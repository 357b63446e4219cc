"""Limits of connections: idle and slow ones, their number, headers that are too long."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import ssl
from typing import Any, cast

import pytest
from aiohttp import ClientSession

from sollold.api.http import connections
from sollold.api.http.application import Listener, build_app
from sollold.api.http.connections import (
    ClientConnection,
    Connections,
    connection_limit,
    raise_descriptor_limit,
)
from sollold.settings.schema import HttpSettings
from tests.api.api_parts import ScriptedService, parts
from tests.api.conftest import Serve
from tests.doubles import until


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


class FakeTransport:
    """A transport that records calls."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = self.aborted = False
        self.written = b""

    def get_extra_info(self, name: str) -> Any:
        return (self.address, 1) if name == "peername" else None

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = self.aborted = True

    def close(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None:
        self.written += data


class Handler(asyncio.Protocol):
    """Records what it receives."""

    def __init__(self) -> None:
        self.data = b""
        self.over = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True


def receive(connection: ClientConnection, data: bytes) -> None:
    """Pass ``data`` on as a transport does."""
    buffer = connection.get_buffer(-1)
    assert len(data) <= len(buffer)
    buffer[: len(data)] = data
    connection.buffer_updated(len(data))


def fake_transport(address: str = "192.168.1.9") -> asyncio.Transport:
    return cast(asyncio.Transport, FakeTransport(address))


def test_connections_are_limited_per_address_except_loopback() -> None:
    connection_limits = Connections(1000, per_address=3)
    transports = [fake_transport() for _ in range(4)]
    assert [connection_limits.admits(transport) for transport in transports] == [True, True, True, False]
    assert connection_limits.admits(fake_transport("192.168.1.10"))
    transports[0].close()
    assert connection_limits.admits(fake_transport()) and not connection_limits.admits(fake_transport())
    assert all(
        connection_limits.admits(fake_transport(address))
        for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1") * 5
    )


def test_connections_are_limited_in_total() -> None:
    connection_limits = Connections(5, per_address=10)
    transports = [fake_transport(f"10.0.0.{number}") for number in range(6)]
    assert [connection_limits.admits(transport) for transport in transports] == [True] * 5 + [False]
    transports[2].close()
    assert connection_limits.admits(fake_transport("10.0.0.9")) and not connection_limits.admits(
        fake_transport("10.0.0.9")
    )


async def test_line_breaks_before_a_request_are_ignored(serve: Serve) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(await serve(parts())))
    for piece in (
        b"\r\n",
        b"\r",
        b"\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ):
        writer.write(piece)
        await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_header_is_passed_on_when_complete() -> None:
    handlers: list[Handler] = []

    def make() -> Handler:
        handlers.append(Handler())
        return handlers[-1]

    for pieces in ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\nmore"], [b"GET / HTTP/1.1\r\n", b"\r", b"\nmore"]):
        handlers.clear()
        connection = ClientConnection(make, Connections(9))
        connection.connection_made(fake_transport())
        for piece in pieces[:-1]:
            receive(connection, piece)
            assert not handlers
        receive(connection, pieces[-1])
        assert handlers[0].data == b"".join(pieces)
        receive(connection, b"and more")
        connection.connection_lost(None)
        assert handlers[0].data.endswith(b"more") and handlers[0].over


@pytest.mark.parametrize("before", [b"", b"\r\n\r\n", b"\n\n"])
async def test_a_slow_header_times_out_with_408(
    serve: Serve, http: ClientSession, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr("sollold.api.http.connections._HEADER_SECONDS", 0.3)
    url = await serve(parts())
    slow = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(50)]
    for _, writer in slow:
        writer.write(before + b"GET / HTTP/1.1\r\nX-A: b\r\n")
    async with http.get(url + "/api/version") as answer:
        assert answer.status == 200
    for reader, writer in slow:
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_tls_on_a_plain_port_is_answered_with_an_explanation(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(bytes.fromhex("16030100a5010000a10303") + bytes(160))
    async with asyncio.timeout(5):
        response = await reader.read()
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"http:// instead of https://" in body and f"Content-Length: {len(body)}".encode() in head
    writer.close()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
        async with asyncio.timeout(5):
            await asyncio.open_connection("127.0.0.1", port_of(url), ssl=context)


async def test_a_connection_without_a_header_ends_with_the_listener() -> None:
    settings = HttpSettings(host="127.0.0.1", port=0)
    listener = Listener(build_app(parts(), settings), settings, drain=0.2)
    await listener.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    writer.write(b"GET")
    await writer.drain()
    await until(lambda: listener._connections._open)
    async with asyncio.timeout(5):
        await listener.close()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_an_endless_header_is_refused(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 40_000)
    async with asyncio.timeout(10):
        assert b" 431 " in await reader.readline()
    writer.close()


async def test_large_cookies_are_accepted_up_to_a_limit(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url + "/api/version", headers={"Cookie": "a=" + "x" * 60_000}) as answer:
        assert answer.status == 200
    async with http.get(url + "/api/version", headers={"Cookie": "a=" + "x" * 70_000}) as answer:
        assert answer.status in (400, 431)


async def test_several_requests_on_one_connection(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    for _ in range(3):
        writer.write(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert b"version" in await reader.readuntil(b"}")
    writer.close()


def test_the_soft_limit_of_descriptors_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 8192)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    assert raise_descriptor_limit() == 8192 and limits[-1] == (8192, 8192)
    assert connection_limit() == 8192 - 2048
    limits.append((1024, 1024))
    assert raise_descriptor_limit() == 1024 and connection_limit() == 512
    limits.append((1024, resource.RLIM_INFINITY))
    assert raise_descriptor_limit() == connections._MAX_DESCRIPTORS


async def test_a_closed_connection_is_not_counted() -> None:
    connection_limits = Connections(1)
    server = await asyncio.get_running_loop().create_server(
        lambda: ClientConnection(Handler, connection_limits), "127.0.0.1", 0
    )
    try:
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await until(lambda: connection_limits._open)
            writer.close()
            await until(
                lambda: all(transport.is_closing() for transport in connection_limits._open["127.0.0.1"])
            )
            assert await reader.read() == b""
    finally:
        server.close()


async def test_a_client_that_does_not_read_its_answer_is_disconnected(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.api.http.connections._UNREAD_SECONDS", 0.3)
    size = 16 << 20
    service = ScriptedService(b'{"prompt":"' + b"x" * size + b'"}')
    port = port_of(await serve(parts(service)))
    body = b'{"model":"demo","messages":[{"role":"user","content":"a"}]}'
    head = b"POST /apply-template HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def received(pause: float) -> int:
        """Number of bytes that arrive if the client reads nothing at first, then slowly."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(head + body)
        await asyncio.sleep(pause)
        count = 0
        with contextlib.suppress(ConnectionError):
            while count < size and (piece := await reader.read(1 << 18)):
                count += len(piece)
                await asyncio.sleep(0.01)
        writer.close()
        return count

    assert await received(1.5) < size <= await received(0.0)
