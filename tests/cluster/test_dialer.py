"""Connections to nodes that are given up in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from sollold.cluster.net.dialer import _attempt
from sollold.cluster.net.identity import Identity, Tokens, tls_name
from sollold.cluster.net.rpc_server import HTTP, Peers
from tests.keys import key

TOKENS = Tokens((b"t" * 32,))


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    found = Peers(Identity(key(1), TOKENS))
    await found.start("127.0.0.1", 0)
    yield found
    await found.close()


def deaf() -> list[asyncio.BaseTransport]:
    """Transports that the loop takes for open, though their descriptors may be another's by now."""
    open_ones = list(asyncio.get_running_loop()._transports.values())  # type: ignore[attr-defined]
    return [one for one in open_ones if not one.is_closing() and one.get_extra_info("socket").fileno() < 0]


async def test_an_attempt_that_is_given_up_at_any_moment_leaves_no_descriptor_behind(peers: Peers) -> None:
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
