"""Tunnels between the head of a deployment and the workers on other nodes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.engines.llamacpp.hash_frames import HashFrames
from sollold.engines.llamacpp.tunnel import Tunnel, Tunnels
from sollold.engines.llamacpp.tunnel_dialer import TunnelClient
from tests.cluster.shells import IDS, Pair
from tests.doubles import FakeView, record, until
from tests.strangers import stranger


def live_view() -> FakeView:
    """The head's view, in which all nodes are alive."""
    view = FakeView(record(IDS[1]))
    view.world.records |= {node: record(node) for node in IDS}
    return view


@dataclass
class Worker:
    """A loopback server that echoes what its clients send.

    Attributes:
        clients: number of clients so far.
        ended: number of clients that have ended.
        silent: answer nothing.
        dies_after: close the connection after this many bytes; 0: never.
        gate: the server reads while this is set.
    """

    port: int = 0
    clients: int = 0
    ended: int = 0
    silent: bool = False
    dies_after: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    server: asyncio.Server | None = None

    async def start(self) -> None:
        self.gate.set()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self.server.sockets[0].getsockname()[1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        left = self.dies_after
        try:
            while (await self.gate.wait()) and (data := await reader.read(1 << 16)):
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
                left -= len(data)
                if self.dies_after and left <= 0:
                    return
        except OSError:
            pass
        finally:
            self.ended += 1
            writer.close()


class HeldFrames(HashFrames):
    """Releases a hash request when ``free`` is set; ``known``: the expected answer of the worker."""

    def __init__(self, known: bytes = b"") -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.known = known

    async def settle(self) -> bytes:
        await self.free.wait()
        return self.known


@dataclass
class Route:
    """A head on one node and a worker on another.

    Attributes:
        asked: caller and deployment of each request for the worker's address.
        plain: address of the external worker of each such request.
        others: how many more times the worker has another client than the tunnel.
        gate_of_d1: holds back hash requests of the deployment d1.
    """

    pair: Pair
    view: FakeView
    worker: Worker
    tunnels: Tunnels
    asked: list[tuple[str, str]] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    others: int = 0
    gate_of_d1: HeldFrames | None = None

    def gate(self, deployment: str) -> HeldFrames | None:
        return self.gate_of_d1

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        self.asked.append((caller, deployment))
        self.plain.append(plain)
        if deployment != "d1":
            raise PeerError("", f"there is no worker for {deployment}", transport=True)
        return "127.0.0.1", self.worker.port

    async def connected(self, deployment: str) -> bool:
        self.others -= 1
        return self.others < 0

    async def connect(self, tunnel: Tunnel) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", tunnel.port, limit=1 << 22)


@pytest.fixture
async def route() -> AsyncIterator[Route]:
    pair, view, worker = Pair(), live_view(), Worker()
    route = Route(pair, view, worker, Tunnels(pair.reach[1], view))
    pair.peers[0].tunnel(route)
    await worker.start()
    await pair.start()
    yield route
    await route.tunnels.close()
    await pair.close()
    assert worker.server is not None
    worker.server.close()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """Read until the connection is closed; empty if it is reset."""
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""


async def test_bytes_are_forwarded_in_both_directions(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    for _ in range(3):
        writer.write(b"token")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    assert route.asked == [(IDS[1], "d1")]
    assert (tunnel.traffic.up, tunnel.traffic.down) == (15, 15)
    assert route.tunnels._open == {tunnel}
    writer.close()
    await until(lambda: route.worker.ended == 1)


async def test_the_owner_receives_the_address_of_an_external_worker(route: Route) -> None:
    own = await route.tunnels.open("d1", IDS[0])
    plain = await route.tunnels.open("d1", IDS[0], external="10.0.0.9:50052")
    lines = [await route.connect(tunnel) for tunnel in (own, plain)]
    for reader, writer in lines:
        writer.write(b"token")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    assert sorted(route.plain) == ["", "10.0.0.9:50052"], "the second tunnel does not close the first"
    for _, writer in lines:
        writer.close()


async def test_the_connection_to_an_external_worker_uses_keepalive(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0], external="10.0.0.9:50052")
    reader, writer = await route.connect(tunnel)
    writer.write(b"token")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    (line,) = route.pair.peers[0]._tunnels._open
    assert line._transport is not None
    worker = line._transport.get_protocol()._other.transport  # type: ignore[attr-defined]
    assert worker.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    writer.close()


async def test_large_transfers_are_unchanged_and_have_backpressure(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    sent = os.urandom(96 << 20)
    route.worker.gate.clear()

    async def send() -> None:
        view = memoryview(sent)
        for start in range(0, len(sent), 1 << 18):
            writer.write(view[start : start + (1 << 18)])
            await writer.drain()

    sending = asyncio.create_task(send())
    forwarded = 0
    while not forwarded or forwarded != tunnel.traffic.up:
        forwarded = tunnel.traffic.up
        await asyncio.sleep(0.5)
    assert 0 < forwarded < len(sent), "unread bytes must not accumulate in the daemons' memory"
    assert not sending.done()
    route.worker.gate.set()
    received = hashlib.sha256()
    remaining = len(sent)
    while remaining:
        chunk = await asyncio.wait_for(reader.read(1 << 20), 20)
        assert chunk
        received.update(chunk)
        remaining -= len(chunk)
    await sending
    assert received.digest() == hashlib.sha256(sent).digest()
    writer.close()


async def test_the_workers_end_is_forwarded_after_its_last_bytes(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    route.worker.dies_after = 1_000_000
    writer.write(b"x" * 1_000_000)
    assert await asyncio.wait_for(reader.readexactly(1_000_000), 5) == b"x" * 1_000_000
    assert await end_of(reader) == b""
    writer.close()


async def test_the_workers_end_is_reported_as_a_break_and_the_clients_is_not(route: Route) -> None:
    breaks: list[str] = []
    tunnel = await route.tunnels.open("d1", IDS[0], breaks.append)
    _, writer = await route.connect(tunnel)
    writer.write(b"hello")
    await until(lambda: tunnel.traffic.down == 5)
    writer.close()
    await until(lambda: route.worker.ended == 1)

    reader, writer = await route.connect(tunnel)
    route.worker.dies_after = 5
    writer.write(b"hello")
    assert await end_of(reader) == b"hello"
    await until(lambda: breaks)
    assert len(breaks) == 1 and "the tunnel to pc-0 broke" in breaks[0]
    writer.close()


async def test_a_refusal_closes_the_connection_with_a_reason(route: Route) -> None:
    tunnel = await route.tunnels.open("d2", IDS[0])
    reader, writer = await route.connect(tunnel)
    assert await end_of(reader) == b""
    assert "no worker for d2" in tunnel.failure
    writer.close()


async def test_a_worker_that_does_not_listen_is_reported(route: Route) -> None:
    route.worker.port = 1
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    assert await end_of(reader) == b""
    assert "does not answer on 127.0.0.1:1" in tunnel.failure
    writer.close()


async def test_an_unknown_node_is_reported(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[2])
    reader, writer = await route.connect(tunnel)
    assert await end_of(reader) == b""
    assert "no address" in tunnel.failure
    writer.close()


async def until_ended(route: Route, connections: int) -> None:
    """Wait until as many connections to the worker have ended."""
    await until(lambda: route.worker.ended == connections)


async def test_a_tunnel_serves_successive_clients(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    for number in range(3):
        reader, writer = await route.connect(tunnel)
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        writer.close()
        await until_ended(route, number + 1)


async def connected(route: Route, tunnel: Tunnel) -> asyncio.StreamWriter:
    """A connection through the tunnel that has been used once."""
    reader, writer = await route.connect(tunnel)
    writer.write(b"token")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    return writer


class RecordingDialer(Dialer):
    """Records the transports of the head's connections to the owner; ``stuck``: never connects."""

    def __init__(self, reach: Dialer) -> None:
        self.name = reach.name
        self.reach = reach
        self.made: list[Any] = []
        self.stuck = False

    async def connect(self, *arguments: Any, **more: Any) -> Any:
        if self.stuck:
            await asyncio.Event().wait()
        connection = await self.reach.connect(*arguments, **more)
        self.made.append(connection[0].transport)
        return connection


async def until_made(dialer: RecordingDialer, connections: int) -> None:
    """Wait until the dialer has made as many connections."""
    await until(lambda: len(dialer.made) == connections)


async def test_the_next_connection_is_prepared_in_advance(route: Route) -> None:
    dialer = RecordingDialer(route.pair.reach[1])
    tunnels = Tunnels(dialer, route.view)
    tunnel = await tunnels.open("d1", IDS[0])
    for number in range(1, 4):
        await until_made(dialer, number)
        (await connected(route, tunnel)).close()
        await until_ended(route, number)
    await until_made(dialer, 4)
    dialer.stuck = True
    (await connected(route, tunnel)).close()
    await tunnels.close()
    await until(lambda: all(transport.is_closing() for transport in dialer.made))
    assert route.worker.clients == len(dialer.made) == 4


async def test_an_unused_prepared_connection_is_closed_and_replaced(
    route: Route, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sollold.engines.llamacpp.tunnel_dialer._PREPARED_SECONDS", 0.05)
    dialer = RecordingDialer(route.pair.reach[1])
    tunnels = Tunnels(dialer, route.view)
    tunnel = await tunnels.open("d1", IDS[0])
    await until(lambda: dialer.made and dialer.made[0].is_closing())
    (await connected(route, tunnel)).close()
    assert len(dialer.made) >= 2 and not tunnel.failure
    await tunnels.close()
    assert not caplog.records


async def test_a_prepared_connection_closed_by_the_owner_is_replaced(route: Route) -> None:
    dialer = RecordingDialer(route.pair.reach[1])
    tunnels = Tunnels(dialer, route.view)
    tunnel = await tunnels.open("d1", IDS[0])
    await until(lambda: dialer.made)
    route.pair.peers[0].cut(IDS[1])
    await until(lambda: dialer.made[0].is_closing())
    (await connected(route, tunnel)).close()
    await tunnels.close()


async def test_a_closed_tunnel_leaves_no_prepared_connection(route: Route) -> None:
    dialer = RecordingDialer(route.pair.reach[1])
    tunnels = Tunnels(dialer, route.view)
    opened, stuck_dialer = (
        [await tunnels.open("d1", IDS[0]) for _ in range(2)],
        RecordingDialer(route.pair.reach[1]),
    )
    await until(lambda: len(dialer.made) == 2)
    route.view.world.dead.add(IDS[0])
    route.view.tell()
    await until(lambda: all(transport.is_closing() for transport in dialer.made))
    stuck_dialer.stuck = True
    late = Tunnels(stuck_dialer, route.view)
    await late.open("d1", IDS[0])
    await asyncio.wait_for(late.close(), 2)
    await tunnels.close()
    assert not stuck_dialer.made and not any(tunnel.failure for tunnel in opened)


async def test_a_second_client_does_not_disturb_the_first(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    other, its_writer = await route.connect(tunnel)
    assert await end_of(other) == b""
    assert route.worker.clients == 1
    writer.write(b"still")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"still"
    for stream in (writer, its_writer):
        stream.close()


async def test_another_local_user_is_refused(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    with ExitStack() as stack:
        other = await asyncio.to_thread(stack.enter_context, stranger(tunnel.port))
        assert await asyncio.to_thread(other.outcome) == "refused"
    assert route.worker.clients == 0 and route.asked == []
    reader, writer = await route.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    writer.close()


async def test_the_worker_is_requested_again_a_few_times_if_it_has_another_client(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    route.others = 2
    reader, writer = await route.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    assert len(route.asked) == 3
    writer.close()
    await until(lambda: route.worker.ended == route.worker.clients)
    route.others = 100
    reader, writer = await route.connect(tunnel)
    assert await end_of(reader) == b""
    assert "other programs on this machine connect to the worker of d1" in tunnel.failure
    writer.close()


async def test_a_new_tunnel_replaces_an_abandoned_one(route: Route) -> None:
    first = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(first)
    writer.write(b"one")
    await asyncio.wait_for(reader.readexactly(3), 5)
    second = await route.tunnels.open("d1", IDS[0])
    new_reader, new_writer = await route.connect(second)
    new_writer.write(b"two")
    assert await asyncio.wait_for(new_reader.readexactly(3), 5) == b"two"
    assert await end_of(reader) == b""
    for stream in (writer, new_writer):
        stream.close()


async def test_tunnels_to_a_dead_node_break_immediately(route: Route) -> None:
    route.worker.silent = True
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    writer.write(b"anybody?")
    await until(lambda: route.worker.clients == 1)
    route.view.world.dead.add(IDS[0])
    route.view.tell()
    assert await end_of(reader) == b""
    assert "left or failed" in tunnel.failure
    await until(lambda: route.worker.ended == 1)
    writer.close()


async def test_a_tunnel_that_is_cut_while_it_opens_stays_closed(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    opened, go_on = asyncio.Event(), asyncio.Event()
    dial = tunnel._remote.open

    async def slow() -> TunnelClient:
        client = await dial()
        opened.set()
        await go_on.wait()
        return client

    monkeypatch.setattr(tunnel._remote, "open", slow)
    reader, writer = await route.connect(tunnel)
    await opened.wait()
    tunnel.cut()
    go_on.set()
    assert await end_of(reader) == b""
    await until(lambda: route.worker.ended == route.worker.clients)
    assert "left or failed" in tunnel.failure
    writer.close()


async def test_the_owner_disconnects_the_worker_of_a_dead_head(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    _, writer = await route.connect(tunnel)
    writer.write(b"x")
    await until(lambda: route.worker.clients == 1)
    route.pair.peers[0].drop_node(IDS[1])
    await until(lambda: route.worker.ended == 1)
    writer.close()


async def test_closing_releases_the_port_and_ends_the_connection(route: Route) -> None:
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    await tunnel.close()
    assert await end_of(reader) == b""
    with pytest.raises(ConnectionError):
        await route.connect(tunnel)
    assert not route.tunnels._open
    writer.close()


async def test_an_invalid_greeting_is_refused(route: Route) -> None:
    reader, writer = await asyncio.open_connection(
        *route.pair.where[IDS[0]][0],
        ssl=route.pair.reach[1].context("sollold-tunnel"),
        server_hostname=f"{IDS[0]}.sollold",
    )
    writer.write(b"\xff\xff\xff\xff" + b"rubbish" * 100)
    assert b"greeting is invalid" in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert route.worker.clients == 0


async def test_the_delay_of_a_slow_network_is_simulated(route: Route) -> None:
    slow = Tunnels(route.pair.reach[1], route.view, delay=0.05)
    tunnel = await slow.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    writer.write(b"warm")
    await asyncio.wait_for(reader.readexactly(4), 5)
    began = time.monotonic()
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    assert time.monotonic() - began >= 0.1
    writer.close()
    await slow.close()


async def test_a_held_request_reaches_the_worker_after_its_release(route: Route) -> None:
    gate = route.gate_of_d1 = HeldFrames()
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    hello, hash_request = (
        b"\x0e" + struct.pack("<Q", 3) + b"abc",
        b"\x07" + struct.pack("<Q", 312) + bytes(312),
    )
    writer.write(hello + hash_request[:100])
    assert await asyncio.wait_for(reader.readexactly(len(hello)), 5) == hello
    writer.write(hash_request[100:] + hello)
    await until(lambda: gate.asked is not None)
    gate.free.set()
    assert await asyncio.wait_for(reader.readexactly(len(hash_request + hello)), 5) == hash_request + hello
    graph = b"\x0a" + struct.pack("<Q", 1) + b"g"
    gate.free.clear()
    writer.write(graph + hash_request)
    assert await asyncio.wait_for(reader.readexactly(len(graph + hash_request)), 5) == graph + hash_request
    writer.close()


async def test_the_buffer_behind_a_held_request_is_limited(route: Route) -> None:
    route.gate_of_d1 = HeldFrames()
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    stream = b"\x07" + struct.pack("<Q", 312) + bytes(312) + bytes(1 << 21)
    writer.write(stream)
    assert await asyncio.wait_for(reader.readexactly(len(stream)), 10) == stream
    writer.close()


HASH = b"\x07" + struct.pack("<Q", 312) + bytes(312)


async def test_a_known_answer_is_sent_before_the_worker_answers(route: Route) -> None:
    gate = route.gate_of_d1 = HeldFrames(known=HASH)  # The worker echoes the request.
    gate.free.set()
    tunnel = await route.tunnels.open("d1", IDS[0])
    reader, writer = await route.connect(tunnel)
    writer.write(HASH)
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    route.worker.gate.clear()
    for _ in range(5):
        # The worker is already reading the first request.
        writer.write(HASH)
        assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    writer.write(HASH)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.3)
    route.worker.gate.set()
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    hello = b"\x0e" + struct.pack("<Q", 3) + b"abc"
    writer.write(hello)
    assert await asyncio.wait_for(reader.readexactly(len(hello)), 5) == hello
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.3)
    writer.close()


async def test_known_answers_are_not_used_after_a_worker_answered_differently(route: Route) -> None:
    gate = route.gate_of_d1 = HeldFrames(known=b"found")
    gate.free.set()
    reader, writer = await route.connect(await route.tunnels.open("d1", IDS[0]))
    writer.write(HASH)
    assert await end_of(reader) == b"found"
    writer.close()
    await until(lambda: route.worker.ended == 1)
    again = route.gate_of_d1 = HeldFrames(known=b"found")
    again.free.set()
    reader, writer = await route.connect(await route.tunnels.open("d1", IDS[0]))
    writer.write(HASH)
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    writer.close()
