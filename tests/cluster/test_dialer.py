"""Cancelled connection attempts, and link-local addresses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from sollold.cluster.net import dialer
from sollold.cluster.net.dialer import Dialer, _attempt
from sollold.cluster.net.http_connection import HttpConnection
from sollold.cluster.net.identity import Identity, Tokens, tls_name
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import HTTP, RpcServer
from sollold.tasks import cancel_and_wait
from tests import doubles, netns
from tests.daemons import until
from tests.keys import key

IPV6 = Path("/proc/thread-self/net/if_inet6")
TOKENS = Tokens((b"t" * 32,))


@pytest.fixture
async def peers() -> AsyncIterator[RpcServer]:
    server = RpcServer(Identity(key(1), TOKENS))
    await server.start("127.0.0.1", 0)
    yield server
    await server.close()


def transports_without_socket() -> list[asyncio.BaseTransport]:
    """Transports that the loop considers open although their descriptors are closed and may be reused."""
    transports = list(asyncio.get_running_loop()._transports.values())  # type: ignore[attr-defined]
    return [
        transport
        for transport in transports
        if not transport.is_closing() and transport.get_extra_info("socket").fileno() < 0
    ]


def link_local() -> list[str]:
    """The lines of the usable link-local addresses of this thread's network namespace."""
    lines = IPV6.read_text().splitlines()
    return [line for line in lines if line.startswith("fe80") and not int(line.split()[4], 16) & 0x40]


@pytest.mark.cluster
@pytest.mark.skipif(bool(netns.available()), reason=netns.available())
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_interface_of_a_link_local_address_is_used(loop: str) -> None:
    """Without the interface the error would be EINVAL; with it, nothing listens on the port."""
    with netns.Lan(1) as lan, lan[0].inside():
        line = until(link_local, "the machine has a link-local address")[0]
        address = ipaddress.IPv6Address(int(line.split()[0], 16))
        context = Identity(key(2), TOKENS).client_context(HTTP)
        attempt = _attempt((f"{address}%eth0", 9), context, tls_name(key(1).node), lambda raw: None)
        runner = uvloop.run if loop == "uvloop" else asyncio.run
        with pytest.raises(ConnectionRefusedError):
            runner(attempt)


async def test_an_attempt_cancelled_at_any_moment_leaks_no_descriptor(
    peers: RpcServer,
) -> None:
    context = Identity(key(2), TOKENS).client_context(HTTP)
    ended = 0
    for turns in range(60):
        attempt = asyncio.ensure_future(
            _attempt(("127.0.0.1", peers.port), context, tls_name(key(1).node), lambda raw: None)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        attempt.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await attempt).transport.abort()
            ended += 1
        assert not transports_without_socket(), f"cancelled after {turns} turns of the loop"
    assert ended < 60


async def test_a_connection_made_while_its_caller_is_cancelled_is_closed(
    peers: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is cancelled while the attempts at the other addresses are ended."""

    async def cancelled_and_wait(*tasks: asyncio.Future[Any] | None) -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await cancel_and_wait(*tasks)

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(hold, "127.0.0.1", 0)
    addresses = [("127.0.0.1", silent.sockets[0].getsockname()[1]), ("127.0.0.1", peers.port)]
    reach = Dialer(Identity(key(2), TOKENS), lambda node: addresses)
    monkeypatch.setattr(dialer, "cancel_and_wait", cancelled_and_wait)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(reach.connect(key(1).node, HTTP, asyncio.Protocol, timeout=3))
    opened = [transport for transports in peers._connections.values() for transport in transports]
    assert len(opened) == 1
    await doubles.until(lambda: opened[0].is_closing())
    silent.close()


async def test_too_many_open_files_fail_an_attempt_like_any_other_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = Identity(key(2), TOKENS)

    def fail(protocol: str, *, anyone: bool = False) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(identity, "client_context", fail)
    reach = Dialer(identity, lambda node: [("127.0.0.1", 9)])
    with pytest.raises(PeerError, match="Too many open files"):
        await reach.connect(key(1).node, HTTP, asyncio.Protocol, timeout=1)
    calls = RpcClient(reach, RpcServer(identity))
    with pytest.raises(PeerError, match="Too many open files"):
        await calls.call(key(1).node, "add", True, bool, timeout=1)
    await calls.close()


@pytest.mark.parametrize("refusing", [0, 2])
async def test_a_node_is_reached_at_its_last_address(peers: RpcServer, refusing: int) -> None:
    address = ("127.0.0.1", peers.port)
    addresses = (*[("127.0.0.1", doubles.free_port()) for _ in range(refusing)], address)
    reach = Dialer(Identity(key(2), TOKENS), lambda node: addresses)
    node = key(1).node
    protocol, found, used = await reach.connect(node, HTTP, lambda: HttpConnection(tls_name(node)), timeout=5)
    protocol.close()
    assert (found, used) == (node, address)
