"""Connections to nodes that are given up in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from sollold.cluster.net.dialer import _attempt
from sollold.cluster.net.identity import Identity, Tokens, tls_name
from sollold.cluster.net.rpc_server import HTTP, RpcServer
from tests import netns
from tests.daemons import until
from tests.keys import key

IPV6 = Path("/proc/thread-self/net/if_inet6")
TOKENS = Tokens((b"t" * 32,))


@pytest.fixture
async def peers() -> AsyncIterator[RpcServer]:
    found = RpcServer(Identity(key(1), TOKENS))
    await found.start("127.0.0.1", 0)
    yield found
    await found.close()


def deaf() -> list[asyncio.BaseTransport]:
    """Transports that the loop takes for open, though their descriptors may be another's by now."""
    open_ones = list(asyncio.get_running_loop()._transports.values())  # type: ignore[attr-defined]
    return [one for one in open_ones if not one.is_closing() and one.get_extra_info("socket").fileno() < 0]


def link_local() -> list[str]:
    """Those of this thread's network, one a line, that are ready for use."""
    lines = IPV6.read_text().splitlines()
    return [line for line in lines if line.startswith("fe80") and not int(line.split()[4], 16) & 0x40]


@pytest.mark.cluster
@pytest.mark.skipif(bool(netns.available()), reason=netns.available())
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_interface_of_a_link_local_address_is_used(loop: str) -> None:
    """Without it the system refuses to connect at all; here only nobody listens."""
    with netns.Lan(1) as lan, lan[0].inside():
        line = until(link_local, "it has a link-local address")[0]
        address = ipaddress.IPv6Address(int(line.split()[0], 16))
        context = Identity(key(2), TOKENS).client_context(HTTP)
        attempt = _attempt((f"{address}%eth0", 9), context, tls_name(key(1).node), lambda raw: None)
        runner = uvloop.run if loop == "uvloop" else asyncio.run
        with pytest.raises(ConnectionRefusedError):
            runner(attempt)


async def test_an_attempt_that_is_given_up_at_any_moment_leaves_no_descriptor_behind(
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
        assert not deaf(), f"given up after {turns} turns of the loop"
    assert ended < 60
