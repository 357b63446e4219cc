from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from sollold.cluster.net import identity
from sollold.cluster.net.dialer import Dialer, in_words, socket_address
from sollold.cluster.net.identity import OPEN_TOKEN, BadToken, Identity, Tokens
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import HTTP, RpcServer
from tests.cluster.shells import IDS, Pair
from tests.keys import key

OTHER, THIRD = "ab" * 32, "cd" * 32


async def test_a_clock_before_every_certificate_separates_no_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity, "_VALID_FROM", identity._VALID_UNTIL.replace(year=9998))
    pair = Pair()
    try:
        await pair.start()
        protocol, node, _ = await pair.reach[0].connect(IDS[1], HTTP, asyncio.Protocol, timeout=5)
        assert node == IDS[1] and protocol is not None
    finally:
        await pair.close()


def test_the_node_id_survives_a_restart(tmp_path: Path) -> None:
    first = NodeKey.load(tmp_path).node
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert NodeKey.load(tmp_path).node == first
    assert stat.S_IMODE((tmp_path / "node-key").stat().st_mode) == 0o600


def test_a_damaged_key_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "node-key").write_bytes(b"\xff\x00not a key")
    assert len(NodeKey.load(tmp_path).node) == 16
    assert (tmp_path / "node-key.unread").read_bytes() == b"\xff\x00not a key"


def test_the_state_of_an_earlier_release_gets_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "node-id").write_text("00ff" * 4 + "\n")
    node = NodeKey.load(tmp_path).node
    assert node != "00ff" * 4 and NodeKey.load(tmp_path).node == node
    assert not (tmp_path / "node-id").exists()
    assert "00ff" * 4 in caplog.text and node in caplog.text


def test_a_key_readable_by_others_is_made_private(tmp_path: Path) -> None:
    first = NodeKey.load(tmp_path).node
    (tmp_path / "node-key").chmod(0o644)
    assert NodeKey.load(tmp_path).node == first
    assert stat.S_IMODE((tmp_path / "node-key").stat().st_mode) == 0o600


def test_a_signature_is_valid_only_for_its_node_and_text() -> None:
    mine, other = key(0), key(1)
    signature = mine.sign(b"text")
    assert mine.verify(mine.node, mine.public, signature, b"text")
    assert not mine.verify(mine.node, mine.public, signature, b"another text")
    assert not mine.verify(other.node, mine.public, signature, b"text")
    assert not mine.verify(mine.node, other.public, other.sign(b"text"), b"text")
    assert not mine.verify(mine.node, b"short", signature, b"text")


class _Impostor(NodeKey):
    """The key of a member that uses another member's id."""

    def __init__(self, name: str) -> None:
        super().__init__(bytes(32))
        self.node = name


async def test_a_member_cannot_impersonate_another(pair: Pair) -> None:
    """Its certificate is signed with the cluster's token, but has its own key."""
    await pair.start()
    identity = Identity(_Impostor(IDS[0]), Tokens.read(""))
    calls, server = (
        RpcClient(Dialer(identity, lambda node: pair.where[node]), RpcServer(identity)),
        RpcServer(identity),
    )
    pair.calls.append(calls)
    pair.peers.append(server)
    calls_received: list[str] = []

    async def answer(caller: str, request: None) -> None:
        calls_received.append(caller)

    pair.peers[1].method("ask", type(None), answer)
    server.method("ask", type(None), answer)
    with pytest.raises(PeerError):
        await calls.call(IDS[1], "ask", None, type(None), timeout=3)
    port = await server.start("127.0.0.1", 0)
    pair.where[IDS[0]] = [("127.0.0.1", port)]
    with pytest.raises(PeerError):
        await pair.calls[1].call(IDS[0], "ask", None, type(None), timeout=3)
    assert not calls_received


def test_tokens_are_parsed() -> None:
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


async def error_of_call(pair: Pair, *tokens: str) -> str:
    """The error of a call with these tokens; empty if the tokens are accepted."""
    try:
        await pair.caller(tokens[0], *tokens[1:]).call(IDS[0], "nothing", None, type(None), timeout=3)
    except PeerError as error:
        return "" if "no call is named" in str(error) else str(error)
    raise AssertionError


async def test_only_the_clusters_token_is_accepted(pair: Pair) -> None:
    await pair.start()
    assert await error_of_call(pair, "") == ""
    assert "another cluster" in await error_of_call(pair, OTHER)


async def test_a_certificate_of_the_new_token_is_refused_by_a_node_with_the_old_one(pair: Pair) -> None:
    await pair.start()
    # It trusts the server, but shows a certificate of the new token, which the server does not know.
    assert await error_of_call(pair, OTHER, "open") != ""
    # The first step of a change: use the old token, accept both.
    assert await error_of_call(pair, "open", OTHER) == ""


async def test_another_node_at_the_address_is_refused(pair: Pair) -> None:
    await pair.start()
    pair.where[IDS[2]] = pair.where[IDS[0]]
    with pytest.raises(PeerError, match="another node answers there") as caught:
        await pair.calls[1].call(IDS[2], "nothing", None, type(None), timeout=3)
    assert caught.value.transport


async def test_the_working_address_of_a_node_is_found_and_preferred(pair: Pair) -> None:
    await pair.start()
    right = pair.where[IDS[0]][0]
    wrong = pair.where[IDS[1]][0]
    pair.where[IDS[0]] = [("127.0.0.99", 1), wrong, right]
    reach = Dialer(pair.reach[1]._identity, lambda node: pair.where[node])
    protocol, found, address = await reach.connect(IDS[0], "sollold-http", _Silent, timeout=5)
    protocol.transport.abort()
    assert (found, address) == (IDS[0], right)
    assert reach.addresses(IDS[0])[0] == right
    # The HTTP client tries all of them too.
    with pytest.raises(PeerError, match="no call is named"):
        await pair.calls[1].call(IDS[0], "nothing", None, type(None), timeout=5)


async def test_a_connection_to_an_unknown_node_returns_its_id(pair: Pair) -> None:
    await pair.start()
    protocol, found, _ = await pair.reach[1].connect(
        "", "sollold-http", _Silent, timeout=5, addresses=pair.where[IDS[0]]
    )
    protocol.transport.abort()
    assert found == IDS[0]


async def test_connection_errors_are_explained(pair: Pair) -> None:
    with pytest.raises(PeerError, match="nothing listens there"):
        await pair.reach[1].connect(IDS[0], "sollold-http", _Silent, timeout=2, addresses=[("127.0.0.1", 1)])
    with pytest.raises(PeerError, match="no address"):
        await pair.reach[1].connect(IDS[0], "sollold-http", _Silent, timeout=2)


def test_error_messages_of_the_system_replace_those_of_asyncio() -> None:
    error = OSError(errno.EHOSTUNREACH, "Connect call failed ('10.0.0.9', 11436)")
    assert in_words(error) == "No route to host"
    assert in_words(socket.gaierror(socket.EAI_NONAME, "Name or service not known")) == (
        "Name or service not known"
    )
    assert "WRONG_VERSION" in in_words(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"))


class _Silent(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


def test_addresses_are_resolved_once_unless_they_name_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **more: Any) -> Any:
        resolved.append(host)
        return real(host.partition("%")[0], *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(3):
        assert socket_address(("2001:db8::77", 4)) == (socket.AF_INET6, ("2001:db8::77", 4, 0, 0))
        socket_address(("fe80::77%eth0", 4))
    assert sorted(resolved) == ["2001:db8::77", *["fe80::77%eth0"] * 3]
