from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from sollold.cluster.identity import OPEN_TOKEN, BadToken, Tokens, node_id
from sollold.cluster.peer import PeerError
from sollold.cluster.reach import Reach
from tests.cluster.shells import IDS, Pair

OTHER, THIRD = "ab" * 32, "cd" * 32


def test_the_node_id_is_kept(tmp_path: Path) -> None:
    first = node_id(tmp_path)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert node_id(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "node-id").stat().st_mode) == 0o600


def test_a_spoilt_node_id_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_bytes(b"\xff\x00not an id")
    assert len(node_id(tmp_path)) == 16


def test_tokens() -> None:
    assert Tokens.read("").open
    assert Tokens.read("open").accepted == (OPEN_TOKEN,)
    closed = Tokens.read(OTHER, [THIRD, OTHER, THIRD])
    assert closed.accepted == (bytes.fromhex(OTHER), bytes.fromhex(THIRD))
    assert not closed.open
    assert Tokens.read(OTHER, ["open"]).open, "an open cluster stays open until the open token is dropped"
    assert closed.cluster != Tokens.read(THIRD).cluster
    changing = Tokens.read(THIRD, [OTHER])
    assert changing.clusters == (Tokens.read(THIRD).cluster, Tokens.read(OTHER).cluster)
    for bad in ("abc", "zz" * 32, "ab" * 31):
        with pytest.raises(BadToken):
            Tokens.read(bad)


async def knock(pair: Pair, *tokens: str) -> str:
    """What a caller with these tokens meets; empty when it is let in."""
    try:
        await pair.caller(tokens[0], *tokens[1:]).call(IDS[0], "nothing", None, type(None), timeout=3)
    except PeerError as error:
        return "" if "no call is named" in str(error) else str(error)
    raise AssertionError


async def test_only_the_token_opens(pair: Pair) -> None:
    await pair.start()
    assert await knock(pair, "") == ""
    assert "another cluster" in await knock(pair, OTHER)


async def test_a_caller_with_both_tokens_is_not_believed_by_who_has_the_old_one_only(pair: Pair) -> None:
    await pair.start()
    # It trusts the server, but shows a certificate of the new token, which the server does not know.
    assert await knock(pair, OTHER, "open") != ""
    # The first step of a change: show the old, accept both.
    assert await knock(pair, "open", OTHER) == ""


async def test_another_node_at_the_address_is_refused(pair: Pair) -> None:
    await pair.start()
    pair.where[IDS[2]] = pair.where[IDS[0]]
    with pytest.raises(PeerError, match="another node answers there") as caught:
        await pair.calls[1].call(IDS[2], "nothing", None, type(None), timeout=3)
    assert caught.value.transport


async def test_the_address_that_leads_to_the_node_is_found_and_kept(pair: Pair) -> None:
    await pair.start()
    right = pair.where[IDS[0]][0]
    wrong = pair.where[IDS[1]][0]
    pair.where[IDS[0]] = [("127.0.0.99", 1), wrong, right]
    reach = Reach(pair.reach[1]._identity, lambda node: pair.where[node])
    protocol, found, address = await reach.connect(IDS[0], "sollold-http", _Silent, timeout=5)
    protocol.transport.abort()
    assert (found, address) == (IDS[0], right)
    assert reach.addresses(IDS[0])[0] == right
    # The HTTP client tries all of them too.
    with pytest.raises(PeerError, match="no call is named"):
        await pair.calls[1].call(IDS[0], "nothing", None, type(None), timeout=5)


async def test_who_is_there_may_be_left_open(pair: Pair) -> None:
    await pair.start()
    protocol, found, _ = await pair.reach[1].connect(
        "", "sollold-http", _Silent, timeout=5, addresses=pair.where[IDS[0]]
    )
    protocol.transport.abort()
    assert found == IDS[0]


async def test_nobody_there_is_told_in_words(pair: Pair) -> None:
    with pytest.raises(PeerError, match="nothing listens there"):
        await pair.reach[1].connect(IDS[0], "sollold-http", _Silent, timeout=2, addresses=[("127.0.0.1", 1)])
    with pytest.raises(PeerError, match="no address"):
        await pair.reach[1].connect(IDS[0], "sollold-http", _Silent, timeout=2)


class _Silent(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
