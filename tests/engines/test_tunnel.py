from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.engines.llamacpp.hash_frames import HashFrames
from sollold.engines.llamacpp.tunnel import Tunnel, Tunnels
from tests.cluster.shells import IDS, Pair
from tests.doubles import until
from tests.strangers import stranger


@dataclass
class Live:
    """A view that knows who lives and nothing else."""

    nodes: list[str] = field(default_factory=lambda: list(IDS))
    callbacks: list[Callable[[], None]] = field(default_factory=list)

    def live(self) -> tuple[Live.Node, ...]:
        return tuple(Live.Node(node) for node in self.nodes)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    @dataclass
    class Node:
        node: str


@dataclass
class Worker:
    """A loopback server that serves one client at a time, as a worker does; it echoes."""

    port: int = 0
    clients: int = 0
    ended: int = 0
    silent: bool = False
    dies_after: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """It reads while this is set."""
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


class Held(HashFrames):
    """Lets a hash pass when ``free`` is set; ``known``: what the worker will answer."""

    def __init__(self, known: bytes = b"") -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.known = known

    async def settle(self) -> bytes:
        await self.free.wait()
        return self.known


@dataclass
class Way:
    """Head on one node, worker on the other."""

    pair: Pair
    view: Live
    worker: Worker
    tunnels: Tunnels
    asked: list[tuple[str, str]] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    others: int = 0
    """How often the worker still has another client than the tunnel."""

    gate_of_d1: Held | None = None

    def gate(self, deployment: str) -> Held | None:
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
async def way() -> AsyncIterator[Way]:
    pair, view, worker = Pair(), Live(), Worker()
    made = Way(pair, view, worker, Tunnels(pair.reach[1], view))  # type: ignore[arg-type]
    pair.peers[0].tunnel(made)
    await worker.start()
    await pair.start()
    yield made
    await made.tunnels.close()
    await pair.close()
    assert worker.server is not None
    worker.server.close()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""


async def test_bytes_go_up_and_come_back(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    for _ in range(3):
        writer.write(b"token")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    assert way.asked == [(IDS[1], "d1")]
    assert (tunnel.traffic.up, tunnel.traffic.down) == (15, 15)
    assert way.tunnels.all() == (tunnel,)
    writer.close()
    await until(lambda: way.worker.ended == 1)


async def test_the_owner_is_told_which_worker_that_others_started_is_meant(way: Way) -> None:
    own = await way.tunnels.open("d1", IDS[0])
    plain = await way.tunnels.open("d1", IDS[0], external="10.0.0.9:50052")
    lines = [await way.connect(one) for one in (own, plain)]
    for reader, writer in lines:
        writer.write(b"token")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    assert sorted(way.plain) == ["", "10.0.0.9:50052"], "and the second did not end the first"
    for _, writer in lines:
        writer.close()


async def test_the_machine_of_a_worker_that_others_started_is_watched(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0], external="10.0.0.9:50052")
    reader, writer = await way.connect(tunnel)
    writer.write(b"token")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    (line,) = way.pair.peers[0]._tunnels._open
    assert line._transport is not None
    worker = line._transport.get_protocol()._other.transport  # type: ignore[attr-defined]
    assert worker.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    writer.close()


async def test_much_goes_through_unharmed_and_waits_with_the_sender(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    sent = os.urandom(96 << 20)
    way.worker.gate.clear()

    async def send() -> None:
        view = memoryview(sent)
        for at in range(0, len(sent), 1 << 18):
            writer.write(view[at : at + (1 << 18)])
            await writer.drain()

    sending = asyncio.create_task(send())
    taken = 0
    while not taken or taken != tunnel.traffic.up:
        taken = tunnel.traffic.up
        await asyncio.sleep(0.5)
    assert 0 < taken < len(sent), "what the worker does not read must not pile up in our memory"
    assert not sending.done()
    way.worker.gate.set()
    got = hashlib.sha256()
    left = len(sent)
    while left:
        piece = await asyncio.wait_for(reader.read(1 << 20), 20)
        assert piece
        got.update(piece)
        left -= len(piece)
    await sending
    assert got.digest() == hashlib.sha256(sent).digest()
    writer.close()


async def test_the_workers_end_is_told_after_its_last_bytes(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    way.worker.dies_after = 1_000_000
    writer.write(b"x" * 1_000_000)
    assert await asyncio.wait_for(reader.readexactly(1_000_000), 5) == b"x" * 1_000_000
    assert await end_of(reader) == b""
    writer.close()


async def test_a_break_is_told_and_a_clients_end_is_none(way: Way) -> None:
    breaks: list[str] = []
    tunnel = await way.tunnels.open("d1", IDS[0], breaks.append)
    _, writer = await way.connect(tunnel)
    writer.write(b"hello")
    await until(lambda: tunnel.traffic.down == 5)
    writer.close()
    await until(lambda: way.worker.ended == 1)

    reader, writer = await way.connect(tunnel)
    way.worker.dies_after = 5
    writer.write(b"hello")
    assert await end_of(reader) == b"hello"
    await until(lambda: breaks)
    assert len(breaks) == 1 and "the tunnel to pc-0 broke" in breaks[0]
    writer.close()


async def test_a_refusal_closes_and_says_why(way: Way) -> None:
    tunnel = await way.tunnels.open("d2", IDS[0])
    reader, writer = await way.connect(tunnel)
    assert await end_of(reader) == b""
    assert "no worker for d2" in tunnel.failure
    writer.close()


async def test_a_worker_that_does_not_listen(way: Way) -> None:
    way.worker.port = 1
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    assert await end_of(reader) == b""
    assert "does not answer on 127.0.0.1:1" in tunnel.failure
    writer.close()


async def test_a_node_that_is_not_there(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[2])
    reader, writer = await way.connect(tunnel)
    assert await end_of(reader) == b""
    assert "no address" in tunnel.failure
    writer.close()


async def test_one_client_after_the_other(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    for turn in range(3):
        reader, writer = await way.connect(tunnel)
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        writer.close()
        await until(lambda turn=turn: way.worker.ended == turn + 1)


async def token(way: Way, tunnel: Tunnel) -> asyncio.StreamWriter:
    """A connection through which a token has gone."""
    reader, writer = await way.connect(tunnel)
    writer.write(b"token")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"token"
    return writer


@dataclass
class Dials:
    """What the head connects to the owner with."""

    reach: Dialer
    made: list[Any] = field(default_factory=list)
    stuck: bool = False

    def name(self, node: str) -> str:
        return self.reach.name(node)

    async def connect(self, *arguments: Any, **more: Any) -> Any:
        if self.stuck:
            await asyncio.Event().wait()
        found = await self.reach.connect(*arguments, **more)
        self.made.append(found[0].transport)
        return found


async def test_the_next_connection_is_made_before_it_is_asked_for(way: Way) -> None:
    dials = Dials(way.pair.reach[1])
    tunnels = Tunnels(dials, way.view)  # type: ignore[arg-type]
    tunnel = await tunnels.open("d1", IDS[0])
    for turn in range(1, 4):
        await until(lambda turn=turn: len(dials.made) == turn)
        (await token(way, tunnel)).close()
        await until(lambda turn=turn: way.worker.ended == turn)
    await until(lambda: len(dials.made) == 4)
    dials.stuck = True
    (await token(way, tunnel)).close()
    await tunnels.close()
    await until(lambda: all(one.is_closing() for one in dials.made))
    assert way.worker.clients == len(dials.made) == 4


async def test_a_connection_that_nobody_asked_for_is_closed_and_made_anew(
    way: Way, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sollold.engines.llamacpp.tunnel_dialer._PREPARED_SECONDS", 0.05)
    dials = Dials(way.pair.reach[1])
    tunnels = Tunnels(dials, way.view)  # type: ignore[arg-type]
    tunnel = await tunnels.open("d1", IDS[0])
    await until(lambda: dials.made and dials.made[0].is_closing())
    (await token(way, tunnel)).close()
    assert len(dials.made) >= 2 and not tunnel.failure
    await tunnels.close()
    assert not caplog.records


async def test_an_owner_that_has_closed_what_nobody_asked_for_is_dialled_anew(way: Way) -> None:
    dials = Dials(way.pair.reach[1])
    tunnels = Tunnels(dials, way.view)  # type: ignore[arg-type]
    tunnel = await tunnels.open("d1", IDS[0])
    await until(lambda: dials.made)
    way.pair.peers[0].cut(IDS[1])
    await until(lambda: dials.made[0].is_closing())
    (await token(way, tunnel)).close()
    await tunnels.close()


async def test_a_tunnel_that_is_closed_leaves_no_connection(way: Way) -> None:
    dials = Dials(way.pair.reach[1])
    tunnels = Tunnels(dials, way.view)  # type: ignore[arg-type]
    made, dialling = [await tunnels.open("d1", IDS[0]) for _ in range(2)], Dials(way.pair.reach[1])
    await until(lambda: len(dials.made) == 2)
    way.view.nodes.remove(IDS[0])
    for callback in list(way.view.callbacks):
        callback()
    await until(lambda: all(one.is_closing() for one in dials.made))
    dialling.stuck = True
    late = Tunnels(dialling, way.view)  # type: ignore[arg-type]
    await late.open("d1", IDS[0])
    await asyncio.wait_for(late.close(), 2)
    await tunnels.close()
    assert not dialling.made and not any(one.failure for one in made)


async def test_a_second_client_does_not_disturb_the_first(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    other, its_writer = await way.connect(tunnel)
    assert await end_of(other) == b""
    assert way.worker.clients == 1
    writer.write(b"still")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"still"
    for one in (writer, its_writer):
        one.close()


async def test_another_user_of_this_machine_gets_no_tunnel(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    with ExitStack() as stack:
        other = await asyncio.to_thread(stack.enter_context, stranger(tunnel.port))
        assert await asyncio.to_thread(other.outcome) == "refused"
    assert way.worker.clients == 0 and way.asked == []
    reader, writer = await way.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    writer.close()


async def test_a_worker_with_another_client_is_asked_for_anew_a_few_times(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    way.others = 2
    reader, writer = await way.connect(tunnel)
    writer.write(b"mine")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"mine"
    assert len(way.asked) == 3
    writer.close()
    await until(lambda: way.worker.ended == way.worker.clients)
    way.others = 100
    reader, writer = await way.connect(tunnel)
    assert await end_of(reader) == b""
    assert "other programs on this machine connect to the worker of d1" in tunnel.failure
    writer.close()


async def test_a_new_tunnel_takes_the_place_of_a_forgotten_one(way: Way) -> None:
    first = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(first)
    writer.write(b"one")
    await asyncio.wait_for(reader.readexactly(3), 5)
    second = await way.tunnels.open("d1", IDS[0])
    new_reader, new_writer = await way.connect(second)
    new_writer.write(b"two")
    assert await asyncio.wait_for(new_reader.readexactly(3), 5) == b"two"
    assert await end_of(reader) == b""
    for one in (writer, new_writer):
        one.close()


async def test_a_dead_node_breaks_its_tunnels_at_once(way: Way) -> None:
    way.worker.silent = True
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    writer.write(b"anybody?")
    await until(lambda: way.worker.clients == 1)
    way.view.nodes.remove(IDS[0])
    for callback in list(way.view.callbacks):
        callback()
    assert await end_of(reader) == b""
    assert "left or failed" in tunnel.failure
    await until(lambda: way.worker.ended == 1)
    writer.close()


async def test_the_owner_lets_go_of_a_dead_heads_worker(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    _, writer = await way.connect(tunnel)
    writer.write(b"x")
    await until(lambda: way.worker.clients == 1)
    way.pair.peers[0].drop_node(IDS[1])
    await until(lambda: way.worker.ended == 1)
    writer.close()


async def test_closing_gives_the_port_back_and_ends_the_connection(way: Way) -> None:
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    await tunnel.close()
    assert await end_of(reader) == b""
    with pytest.raises(ConnectionError):
        await way.connect(tunnel)
    assert way.tunnels.all() == ()
    writer.close()


async def test_rubbish_as_a_greeting_is_refused(way: Way) -> None:
    reader, writer = await asyncio.open_connection(
        *way.pair.where[IDS[0]][0],
        ssl=way.pair.reach[1].context("sollold-tunnel"),
        server_hostname=f"{IDS[0]}.sollold",
    )
    writer.write(b"\xff\xff\xff\xff" + b"rubbish" * 100)
    assert b"greeting is invalid" in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert way.worker.clients == 0


async def test_the_delay_of_a_slow_network(way: Way) -> None:
    slow = Tunnels(way.pair.reach[1], way.view, delay=0.05)  # type: ignore[arg-type]
    tunnel = await slow.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    writer.write(b"warm")
    await asyncio.wait_for(reader.readexactly(4), 5)
    began = time.monotonic()
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    assert time.monotonic() - began >= 0.1
    writer.close()
    await slow.close()


async def test_a_request_that_the_owner_holds_back_comes_to_the_worker_later(way: Way) -> None:
    gate = way.gate_of_d1 = Held()
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    hello, hash = b"\x0e" + struct.pack("<Q", 3) + b"abc", b"\x07" + struct.pack("<Q", 312) + bytes(312)
    writer.write(hello + hash[:100])
    assert await asyncio.wait_for(reader.readexactly(len(hello)), 5) == hello
    writer.write(hash[100:] + hello)
    await until(lambda: gate.asked is not None)
    gate.free.set()
    assert await asyncio.wait_for(reader.readexactly(len(hash + hello)), 5) == hash + hello
    graph = b"\x0a" + struct.pack("<Q", 1) + b"g"
    gate.free.clear()
    writer.write(graph + hash)
    assert await asyncio.wait_for(reader.readexactly(len(graph + hash)), 5) == graph + hash
    writer.close()


async def test_a_head_that_sends_on_while_a_request_is_held_back_is_not_gathered_for_ever(way: Way) -> None:
    way.gate_of_d1 = Held()
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    said = b"\x07" + struct.pack("<Q", 312) + bytes(312) + bytes(1 << 21)
    writer.write(said)
    assert await asyncio.wait_for(reader.readexactly(len(said)), 10) == said
    writer.close()


HASH = b"\x07" + struct.pack("<Q", 312) + bytes(312)


async def test_a_head_has_an_answer_that_is_known_before_the_worker_gives_it(way: Way) -> None:
    gate = way.gate_of_d1 = Held(known=HASH)  # The worker says what it hears.
    gate.free.set()
    tunnel = await way.tunnels.open("d1", IDS[0])
    reader, writer = await way.connect(tunnel)
    writer.write(HASH)
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    way.worker.gate.clear()
    for _ in range(5):
        # The first is being read by the worker already.
        writer.write(HASH)
        assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    writer.write(HASH)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.3)
    way.worker.gate.set()
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    hello = b"\x0e" + struct.pack("<Q", 3) + b"abc"
    writer.write(hello)
    assert await asyncio.wait_for(reader.readexactly(len(hello)), 5) == hello
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.3)
    writer.close()


async def test_a_worker_that_answers_otherwise_is_left_and_from_then_on_waited_for(way: Way) -> None:
    gate = way.gate_of_d1 = Held(known=b"found")
    gate.free.set()
    reader, writer = await way.connect(await way.tunnels.open("d1", IDS[0]))
    writer.write(HASH)
    assert await end_of(reader) == b"found"
    writer.close()
    await until(lambda: way.worker.ended == 1)
    again = way.gate_of_d1 = Held(known=b"found")
    again.free.set()
    reader, writer = await way.connect(await way.tunnels.open("d1", IDS[0]))
    writer.write(HASH)
    assert await asyncio.wait_for(reader.readexactly(len(HASH)), 5) == HASH
    writer.close()
