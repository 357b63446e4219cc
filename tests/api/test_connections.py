"""Connections that never ask, that ask slowly, and that are too many."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import ssl
from collections.abc import Awaitable, Callable
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
from tests.api.api_parts import parts
from tests.doubles import until

Serve = Callable[..., Awaitable[str]]


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


class Wire:
    """A transport that notes what is done with it."""

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
    """What a connection is passed on to."""

    def __init__(self) -> None:
        self.data = b""
        self.over = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True


def receive(one: ClientConnection, data: bytes) -> None:
    """As a transport passes on what came."""
    buffer = one.get_buffer(-1)
    assert len(data) <= len(buffer)
    buffer[: len(data)] = data
    one.buffer_updated(len(data))


def wire(address: str = "192.168.1.9") -> asyncio.Transport:
    return cast(asyncio.Transport, Wire(address))


def test_one_machine_does_not_take_all_connections() -> None:
    counted = Connections(1000, per_address=3)
    several = [wire() for _ in range(4)]
    assert [counted.admits(one) for one in several] == [True, True, True, False]
    assert counted.admits(wire("192.168.1.10"))
    several[0].close()
    assert counted.admits(wire()) and not counted.admits(wire())
    assert all(counted.admits(wire(address)) for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1") * 5)


def test_all_together_leave_descriptors_for_others() -> None:
    counted = Connections(5, per_address=10)
    several = [wire(f"10.0.0.{number}") for number in range(6)]
    assert [counted.admits(one) for one in several] == [True] * 5 + [False]
    several[2].close()
    assert counted.admits(wire("10.0.0.9")) and not counted.admits(wire("10.0.0.9"))


async def test_a_header_is_passed_on_when_it_is_whole() -> None:
    made: list[Handler] = []

    def make() -> Handler:
        made.append(Handler())
        return made[-1]

    for pieces in ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\nmore"], [b"GET / HTTP/1.1\r\n", b"\r", b"\nmore"]):
        made.clear()
        one = ClientConnection(make, Connections(9))
        one.connection_made(wire())
        for piece in pieces[:-1]:
            receive(one, piece)
            assert not made
        receive(one, pieces[-1])
        assert made[0].data == b"".join(pieces)
        receive(one, b"and more")
        one.connection_lost(None)
        assert made[0].data.endswith(b"more") and made[0].over


async def test_a_slow_header_is_ended(
    serve: Serve, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.api.http.connections._HEADER_SECONDS", 0.3)
    url = await serve(parts())
    slow = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(50)]
    for _, writer in slow:
        writer.write(b"GET / HTTP/1.1\r\nX-A: b\r\n")
    async with http.get(url + "/api/version") as answer:
        assert answer.status == 200
    for reader, writer in slow:
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_who_speaks_tls_is_told_at_once_that_nobody_does_here(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(bytes.fromhex("16030100a5010000a10303") + bytes(160))
    async with asyncio.timeout(5):
        said = await reader.read()
    head, _, body = said.partition(b"\r\n\r\n")
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


async def test_a_header_without_end_is_refused(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 40_000)
    async with asyncio.timeout(10):
        assert b" 431 " in await reader.readline()
    writer.close()


async def test_browsers_send_all_cookies_of_localhost(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url + "/api/version", headers={"Cookie": "a=" + "x" * 60_000}) as answer:
        assert answer.status == 200
    async with http.get(url + "/api/version", headers={"Cookie": "a=" + "x" * 70_000}) as answer:
        assert answer.status in (400, 431)


async def test_requests_on_one_connection(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    for _ in range(3):
        writer.write(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert b"version" in await reader.readuntil(b"}")
    writer.close()


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 8192)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    assert raise_descriptor_limit() == 8192 and limits[-1] == (8192, 8192)
    assert connection_limit() == 8192 - 2048
    limits.append((1024, 1024))
    assert raise_descriptor_limit() == 1024 and connection_limit() == 512
    limits.append((1024, resource.RLIM_INFINITY))
    assert raise_descriptor_limit() == connections._MOST_DESCRIPTORS


async def test_a_connection_that_is_over_counts_no_more() -> None:
    counted = Connections(1)
    server = await asyncio.get_running_loop().create_server(
        lambda: ClientConnection(Handler, counted), "127.0.0.1", 0
    )
    try:
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await until(lambda: counted._open)
            writer.close()
            await until(lambda: all(one.is_closing() for one in counted._open["127.0.0.1"]))
            assert await reader.read() == b""
    finally:
        server.close()
