"""Whole nodes on loopback addresses: seeds, remembered peers, calls, leaving, saved state."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from blockbuster import blockbuster_ctx

from sollold.cluster.gossip.actions import Address, Change, NodeEvent, PersistedState, PushPullWith
from sollold.cluster.gossip.term import Term
from sollold.cluster.net import gossip_runner
from sollold.cluster.net.interfaces import Interface
from sollold.cluster.net.mdns import Discovery
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import PortTaken
from sollold.cluster.net.seeds import BadSeed, Seed
from sollold.cluster.net.state_file import KeptFile, Peer, merged
from tests.cluster.shells import Nodes
from tests.doubles import until


@dataclass(frozen=True, slots=True)
class Hello:
    name: str


async def greet(caller: str, request: Hello) -> Hello:
    return Hello(f"{request.name}, {caller}")


async def test_three_nodes_join_through_one_seed(nodes: Nodes) -> None:
    first = await nodes.start(1, register=lambda peers: peers.method("greet", Hello, greet))
    second = await nodes.start(2, first)
    third = await nodes.start(3, first)
    await until(lambda: all(len(node.live()) == 3 for node in nodes.running))
    await until(lambda: all(len(node.status().links) == 2 for node in nodes.running))
    await until(lambda: all(node.leader().leader != "" for node in nodes.running))
    assert len({node.leader() for node in nodes.running}) == 1
    me = third.me.node
    answer = await third.calls.call(first.me.node, "greet", Hello("hello"), Hello, timeout=3)
    assert answer == Hello(f"hello, {me}")
    # Changes of a node's record reach the others; equal values are not published.
    changes: list[int] = []
    unsubscribe = second.subscribe(lambda: changes.append(1))
    third.update_me(build="b1", setup="ready")
    await until(lambda: (second.record(me) or second.me).build == "b1")
    assert changes
    unsubscribe()
    version = third.me.version
    third.update_me(build="b1")
    assert third.me.version == version

    def publishes_links(node: ClusterNode) -> bool:
        measured = {peer for peer, trip, _ in node.me.links if 0 < trip < 1}
        return measured == {other.me.node for other in nodes.running if other is not node}

    for node in nodes.running:
        await until(partial(publishes_links, node))


async def test_a_seed_whose_name_server_is_silent_delays_no_other_seed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolved(seed: Seed) -> tuple[Address, ...]:
        if seed.port == hung.port:
            await asyncio.Event().wait()
        return ((seed.host, seed.port),)

    hung, first = await nodes.start(1), await nodes.start(2)
    monkeypatch.setattr("sollold.cluster.net.peer_finder.resolve", resolved)
    third = await nodes.start(3, hung, first)
    await until(lambda: len(third.live()) == 2)


async def test_a_node_that_left_is_removed_at_once_and_calls_to_it_fail(nodes: Nodes) -> None:
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(lambda: len(first.live()) == 2 and len(second.live()) == 2)
    gone = second.me.node
    nodes.running.remove(second)
    await second.close()
    assert await until(lambda: len(first.live()) == 1) < 0.5
    with pytest.raises(PeerError) as caught:
        await first.calls.call(gone, "greet", Hello("x"), Hello, timeout=3)
    assert caught.value.transport


async def test_peers_and_the_term_survive_a_restart(nodes: Nodes, tmp_path: Path) -> None:
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(
        lambda: len(second.live()) == 2 and second.leader().leader != "" and first.leader().leader != ""
    )
    port, me, term, version = second.port, second.me.node, second.leader().counter, second.me.version
    nodes.running.remove(second)
    await second.close()
    remembered = json.loads((tmp_path / "state2" / "peers.json").read_text())
    assert [peer["node"] for peer in remembered] == [first.me.node]
    # Without a seed.
    restarted = await nodes.start(2, port=port)
    assert restarted.me.node == me
    await until(lambda: len(restarted.live()) == 2 and len(first.live()) == 2)
    await until(lambda: restarted.leader() == first.leader() and restarted.leader().leader != "")
    assert restarted.leader().counter >= term
    restarted.update_me(setup="again")
    assert restarted.me.version > version


async def test_a_node_that_restarts_before_it_is_missed_is_seen_absent_once(nodes: Nodes) -> None:
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(lambda: len(first.live()) == 2 and len(second.live()) == 2)
    seen: list[int] = []
    first.subscribe(lambda: seen.append(len(first.live())))
    first._note_change(NodeEvent(Change.RESTARTED, second.me.node))
    await until(lambda: seen[-1:] == [2])
    assert seen[0] == 1


def test_an_address_is_remembered_only_for_its_current_node() -> None:
    here, there = ("10.0.0.1", 1), ("10.0.0.2", 1)
    before = (Peer("old", (here,)), Peer("away", (there,)))
    assert merged((Peer("new", (here,)),), before) == (Peer("new", (here,)), Peer("away", (there,)))


async def test_a_node_starts_with_damaged_files_in_its_state_folder(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state1"
    state.mkdir()
    files = {
        "peers.json": b'[{"node": "\xff", "addresses": []}]',
        "membership.json": b'{"term": {"leader": "\xff"}}',
        "node-key": b"\x00\xffrubbish",
    }
    for name, damage in files.items():
        (state / name).write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        node = await nodes.start(1)
    assert len(node.live()) == 1
    assert "peers.json" in caplog.text
    assert "membership.json" in caplog.text


async def test_nodes_with_different_tokens_do_not_join(nodes: Nodes) -> None:
    first = await nodes.start(1)
    other = await nodes.start(2, first, token="ab" * 32)
    third = await nodes.start(3, first)
    await until(lambda: len(third.live()) == 2)
    await until(lambda: first.status().refused["foreign"] > 0)
    await until(lambda: len(first.live()) == 2)
    assert len(other.live()) == 1


async def test_two_machines_with_one_node_key_both_report_it(nodes: Nodes, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"state{number}").mkdir()
        (tmp_path / f"state{number}" / "node-key").write_text(f"{'aa' * 32}\n")
    first = await nodes.start(0)
    clone = await nodes.start(1, first)
    await until(lambda: first.status().cloned and clone.status().cloned)
    other = await nodes.start(2, first)
    await until(lambda: len(other.live()) == 2)
    assert not other.status().cloned


async def test_unreachable_machines_do_not_delay_exchanges_with_others(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await nodes.start(0)
    done: list[str] = []

    async def fake_sync(way: object, node: str, *rest: Any) -> str:
        if not node:
            await asyncio.Event().wait()
        done.append(node)
        return node

    monkeypatch.setattr(gossip_runner, "sync", fake_sync)
    for number in range(50):
        first._runner.do([PushPullWith("", ((f"192.0.2.{number + 1}", 11436),))])
    first._runner.do([PushPullWith("b" * 16, (("192.0.2.99", 11436),))])
    await until(lambda: done)


async def test_a_port_in_use_is_named_in_the_error(nodes: Nodes) -> None:
    first = await nodes.start(1)
    twin = nodes.make(1, port=first.port)
    with pytest.raises(PortTaken, match=f"port {first.port}/TCP on 127.0.0.2"):
        await twin.start()
    await twin.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.3", 0))
        port = taken.getsockname()[1]
        twin = nodes.make(2, port=port)
        with pytest.raises(PortTaken, match=f"port {port}/UDP on 127.0.0.3"):
            await twin.start()
        await twin.close()


async def test_junk_on_the_gossip_port_is_counted_and_dropped(nodes: Nodes) -> None:
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(lambda: len(second.live()) == 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for size in (0, 1, 40, 1400, 9000):
            stranger.sendto(b"\x01" * size, (first.me.addresses[0], first.port))
    await until(lambda: sum(first.status().refused.values()) >= 5)
    assert len(first.live()) == 2


async def test_a_hanging_disk_delays_only_claims(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()
    write = KeptFile.write

    def hang(file: KeptFile, kept: PersistedState) -> None:
        ready.wait(60)
        write(file, kept)

    with monkeypatch.context() as patch:
        patch.setattr(KeptFile, "write", hang)
        slow = await nodes.start(1)
        other = await nodes.start(2, slow)
        try:
            await until(lambda: len(slow.live()) == 2 and len(other.live()) == 2)
            gossip = other._gossip
            assert gossip is not None and slow._gossip is not None
            # The suspect refutes, which raises its persisted incarnation.
            incarnation = slow._gossip._membership.own.incarnation
            gossip._membership.suspect(slow.me.node, time.monotonic())
            await until(lambda: slow._gossip and slow._gossip._membership.own.incarnation > incarnation)
            await until(
                lambda: slow.leader().leader == "" and slow._gossip and slow._gossip._leadership.claiming
            )
        finally:
            ready.set()
        await until(lambda: slow.leader() == other.leader() != Term())


async def test_without_ipv6_a_node_listens_on_ipv4(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = socket.socket

    class SocketWithoutIPv6(real):  # type: ignore[misc, valid-type]
        def __init__(self, family: int = -1, *arguments: int, **more: int) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *arguments, **more)

    node = nodes.make(1, host="::")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", SocketWithoutIPv6)
        await node.start()
    nodes.running.append(node)
    with real(socket.AF_INET, socket.SOCK_STREAM) as caller:
        caller.connect(("127.0.0.1", node.port))
    assert not any(":" in address for address in node.me.addresses)


async def test_local_nodes_without_announcements_are_reported(nodes: Nodes) -> None:
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(lambda: len(first.live()) == 2)
    await until(lambda: first._gossip and first._gossip.known.addresses(second.me.node))
    first._finder._networks = ("127.0.0.0/24",)
    announced: dict[str, tuple[tuple[str, int], ...]] = {}

    class FakeDiscovery:
        working = True

        def status(self) -> FakeDiscovery:
            return self

        def seen(self) -> dict[str, tuple[tuple[str, int], ...]]:
            return announced

    for names in ((), ("m2",), ("m2",)):
        first._finder._check_multicast(cast(Discovery, FakeDiscovery()))
        assert first.status().unheard == names
    announced[second.me.node] = (("127.0.0.3", 1),)
    first._finder._check_multicast(cast(Discovery, FakeDiscovery()))
    assert first.status().unheard == ()


async def test_addresses_stay_announced_while_no_network_card_is_up(nodes: Nodes) -> None:
    node = await nodes.start(1)
    card = Interface("eth0", 0, ("192.168.1.5",))
    bridge, vpn = Interface("docker0", 3, ("172.17.0.1",)), Interface("wg0", 2, ("10.8.0.2",))
    wlan = Interface("wlan0", 1, ("192.168.1.6",))
    for found, announced in (
        ((vpn,), ("10.8.0.2",)),
        ((card, bridge), ("192.168.1.5", "172.17.0.1")),
        ((), ("192.168.1.5", "172.17.0.1")),
        ((vpn, bridge), ("192.168.1.5", "172.17.0.1", "10.8.0.2")),
        ((wlan, vpn), ("192.168.1.6", "10.8.0.2")),
    ):
        node._finder._use_interfaces(found)
        assert node.me.addresses == announced


async def test_closing_leaves_no_tasks(nodes: Nodes) -> None:
    before = asyncio.all_tasks()
    first = await nodes.start(1)
    second = await nodes.start(2, first)
    await until(lambda: len(first.status().links) == 1 and len(second.status().links) == 1)
    nodes.running.clear()
    await asyncio.gather(first.close(), second.close())
    await first.close()  # closing twice is harmless
    await until(lambda: asyncio.all_tasks() <= before)


async def test_no_call_blocks_the_event_loop(nodes: Nodes) -> None:
    with blockbuster_ctx("sollold.cluster") as watch:
        # This runs before the loop has other work.
        for function in watch.functions.values():
            function.can_block_in("tests/cluster/shells.py", "make")
        first = await nodes.start(1, register=lambda peers: peers.method("greet", Hello, greet))
        second = await nodes.start(2, first)
        await until(lambda: len(first.status().links) == 1 and len(second.status().links) == 1)
        assert (
            await second.calls.call(first.me.node, "greet", Hello("x"), Hello, timeout=3)
        ).name.startswith("x")
        await until(lambda: second.leader().leader != "")
        nodes.running.clear()
        await asyncio.gather(first.close(), second.close())


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("one.example", Seed("one.example", 11436)),
        ("one.example:7", Seed("one.example", 7)),
        ("10.0.0.1:11436", Seed("10.0.0.1", 11436)),
        ("fd00::1", Seed("fd00::1", 11436)),
        ("[fd00::1]:9", Seed("fd00::1", 9)),
        ("[fd00::1]", Seed("fd00::1", 11436)),
    ],
)
def test_seeds_are_parsed(text: str, seed: Seed) -> None:
    assert Seed.read(text, 11436) == seed


@pytest.mark.parametrize("text", ["", "a:b", "a:70000", ":1", "[fd00::1", "[fd00::1]9", "a:0"])
def test_invalid_seeds_are_refused(text: str) -> None:
    with pytest.raises(BadSeed, match=r"cluster\.seeds"):
        Seed.read(text, 11436)


async def test_a_node_warns_once_that_others_will_reject_its_record(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first = await nodes.start(1)
    for _ in range(2):
        first.update_me(http_port=70_000, setup=f"{caplog.text}x")
    assert caplog.text.count("the other nodes will reject this node's record: 70000 is not a port") == 1
    first.update_me(http_port=1, cached=tuple((f"{number}" * 400, 1) for number in range(1000)))
    assert "the other nodes will reject this node's record: it is too large" in caplog.text
