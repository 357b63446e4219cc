"""Connections to the peer port that never finish their TLS handshake."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from sollold.cluster.net import acceptor
from sollold.cluster.net.acceptor import Acceptor
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc_server import RpcServer
from tests.doubles import until
from tests.keys import key

HELLO = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"


@pytest.fixture
async def peers() -> AsyncIterator[RpcServer]:
    server = RpcServer(Identity(key(1), Tokens((b"t" * 32,))))
    await server.start("127.0.0.1", 0)
    yield server
    await server.close()


async def _ended(reader: asyncio.StreamReader) -> bool:
    try:
        return not await reader.read(1)
    except ConnectionError:
        return True


async def test_handshakes_per_address_are_limited(peers: RpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "is_loopback", lambda address: False)
    # All come from one address, which counts as another machine's.
    opened = [
        await asyncio.open_connection("127.0.0.1", peers.port, local_addr=("127.0.0.2", 0))
        for _ in range(acceptor.PER_ADDRESS + 20)
    ]
    for _, writer in opened:
        writer.write(HELLO)
    ended = [asyncio.ensure_future(_ended(reader)) for reader, _ in opened]
    await until(lambda: sum(task.done() for task in ended) >= 20)
    await asyncio.sleep(0.1)
    assert sum(task.done() for task in ended) == 20
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(
        "127.0.0.1", peers.port, local_addr=("127.0.0.3", 0), ssl=context
    )
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3", (
        "other addresses are accepted meanwhile"
    )
    writer.close()
    for _, other in opened:
        other.close()
    for task in ended:
        task.cancel()


async def test_the_total_number_of_handshakes_is_limited() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port = listening.getsockname()[1]
    never = asyncio.Event()

    async def choose(connection: socket.socket, local: bool) -> None:
        await never.wait()

    server = Acceptor([listening], asyncio.Protocol, choose, handshake=5.0, total=5)
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(9)]
    ended = [asyncio.ensure_future(_ended(reader)) for reader, _ in opened]
    await until(lambda: sum(task.done() for task in ended) == 4)
    never.set()
    await until(lambda: not server._handshakes)
    await asyncio.gather(*ended)
    for _, writer in opened:
        writer.close()
    await server.close()
