from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import Any

import msgspec
import pytest

from sollold.cluster.net import dialer
from sollold.cluster.net.framing import frame
from sollold.cluster.net.link_messages import Bye
from sollold.cluster.net.link_stats import BestRate
from sollold.cluster.net.rpc_server import LINK
from sollold.cluster.net.standing_link import FULL, StandingLinks, neighbours
from tests.cluster.shells import IDS, Pair
from tests.doubles import until


@pytest.mark.parametrize("count", [1, 2, 3, FULL, FULL + 1, 100, 1000])
def test_neighbours_are_mutual_few_and_connect_all_nodes(count: int) -> None:
    nodes = [f"{number:016x}" for number in range(count)]
    wanted = {node: neighbours(node, nodes) for node in nodes}
    for node, others in wanted.items():
        assert node not in others
        assert all(node in wanted[other] for other in others)
    if count <= FULL:
        assert all(len(others) == count - 1 for others in wanted.values())
        return
    assert max(map(len, wanted.values())) <= 2 * count.bit_length()
    reached, edge = {nodes[0]}, {nodes[0]}
    while edge:
        edge = set().union(*(wanted[node] for node in edge)) - reached
        reached |= edge
    assert len(reached) == count


class LinkPair:
    """The links of two nodes, and the callbacks they made: (number of the node, kind, other node)."""

    def __init__(self, pair: Pair) -> None:
        self.events: list[tuple[int, str, str]] = []
        self.measures: list[tuple[int, str, float, float]] = []
        self.links = [self._make(pair, number) for number in range(2)]

    def _make(self, pair: Pair, number: int) -> StandingLinks:
        links = StandingLinks(
            pair.reach[number],
            made=lambda node, address: self.events.append((number, "made", node)),
            lost=lambda node, silent: self.events.append((number, "silent" if silent else "lost", node)),
            measured=lambda node, trip, rate: self.measures.append((number, node, trip, rate)),
        )
        links.port, links.boot = 11436, number + 1
        pair.peers[number].speak(LINK, links.accept)
        return links

    async def start(self, pair: Pair) -> None:
        await pair.start()
        self.links[0].want(frozenset([IDS[1]]))
        self.links[1].want(frozenset([IDS[0]]))
        await until(lambda: self.links[0].up() == (IDS[1],) and self.links[1].up() == (IDS[0],))

    async def close(self) -> None:
        for links in self.links:
            await links.close()


async def test_one_link_is_made_and_measured_on_both_sides(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    assert sorted(link_pair.events) == [(0, "made", IDS[1]), (1, "made", IDS[0])]
    await until(lambda: {number for number, *_ in link_pair.measures} == {0, 1})
    assert all(0 < trip < 1 for _, _, trip, _ in link_pair.measures)
    await until(lambda: any(rate > 1e6 for _, _, _, rate in link_pair.measures), 20)
    await link_pair.close()


async def test_closing_a_link_is_not_a_loss(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    await link_pair.links[1].close()
    await until(lambda: not link_pair.links[0].up())
    await asyncio.sleep(0.05)
    assert not [kind for _, kind, _ in link_pair.events if kind == "lost"]
    await link_pair.close()


async def test_a_lost_link_is_reported_at_once_and_made_again(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link_pair.links[1]._links[IDS[0]]._transport.abort()
    assert await until(lambda: (0, "lost", IDS[1]) in link_pair.events) < 1.0
    await until(
        lambda: [kind for number, kind, _ in link_pair.events if number == 0] == ["made", "lost", "made"]
    )
    await link_pair.close()


async def test_the_link_of_a_former_process_is_dropped_without_a_loss(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link_pair.links[0].drop_node(IDS[1], boot=2)
    assert link_pair.links[0].up() == (IDS[1],), "the link belongs to the new process"
    link_pair.links[0].drop_node(IDS[1], boot=3)
    assert link_pair.links[0].up() == ()
    assert (0, "lost", IDS[1]) not in link_pair.events
    await link_pair.close()


async def test_an_unwanted_link_is_closed(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link_pair.links[1].want(frozenset())
    link_pair.links[0].want(frozenset())
    await until(lambda: not link_pair.links[0].up() and not link_pair.links[1].up())
    assert not [kind for _, kind, _ in link_pair.events if kind == "lost"]
    await link_pair.close()


@pytest.mark.parametrize(
    "sent", [b"\x00\x00\x00\x02hi", b"\xff\xff\xff\xff", b"\x00\x00\x00\x04\x93\x01\x01\x00"]
)
async def test_junk_on_a_link_ends_it(pair: Pair, sent: bytes) -> None:
    link_pair = LinkPair(pair)
    await pair.start()
    reader, writer = await asyncio.open_connection(
        *pair.where[IDS[0]][0], ssl=pair.reach[1].context(LINK), server_hostname=f"{IDS[0]}.sollold"
    )
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        # It ends with a Bye: a faulty link is no sign of a death.
        assert await asyncio.wait_for(reader.read(), 5) in (b"", frame(msgspec.msgpack.encode(Bye())))
    writer.close()
    assert link_pair.links[0].up() == ()
    await link_pair.close()


async def test_a_message_of_a_later_release_does_not_end_a_link(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link = link_pair.links[0]._links[IDS[1]]
    link_pair.links[1]._links[IDS[0]]._transport.write(frame(msgspec.msgpack.encode((6, "news"))))
    link_pair.measures.clear()
    await until(lambda: {number for number, *_ in link_pair.measures} == {0, 1})
    assert link_pair.links[0]._links[IDS[1]] is link and not link.said_bye
    assert {kind for _, kind, _ in link_pair.events} == {"made"}
    await link_pair.close()


async def test_ending_a_link_because_of_invalid_data_is_not_a_loss(pair: Pair) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link_pair.links[1]._links[IDS[0]]._transport.write(frame(b"\xc1"))
    await until(lambda: [kind for number, kind, _ in link_pair.events if number == 0] == ["made", "made"])
    assert {kind for _, kind, _ in link_pair.events} == {"made"}
    await link_pair.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (None, "lost"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "lost"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), "silent"),
        (OSError(errno.EHOSTUNREACH, "no route"), "silent"),
    ],
)
async def test_a_timed_out_link_differs_from_one_ended_by_the_peer(
    pair: Pair, error: Exception | None, kind: str
) -> None:
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    link = link_pair.links[0]._links[IDS[1]]
    link.connection_lost(error)
    assert (0, kind, IDS[1]) in link_pair.events
    await link_pair.close()


def test_a_rate_measured_during_other_traffic_is_ignored() -> None:
    best = BestRate()
    assert best.add(20e6) == 20e6
    assert best.add(110e6) == 110e6
    assert not best.settled
    assert best.add(30e6) == 110e6
    assert best.settled
    # A link that has become slower is noticed after some measurements.
    assert best.add(12e6) == 110e6
    assert best.add(11e6) == 30e6
    assert best.add(12e6) == 12e6


async def test_a_connection_lost_before_it_is_a_link_is_retried(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, lost = dialer._attempt, 0

    async def lose_the_first(*where: Any) -> Any:
        nonlocal lost
        attempted = await attempt(*where)
        if not lost:
            attempted.transport.abort()
            await until(lambda: attempted.lost)
            lost += 1
        return attempted

    monkeypatch.setattr(dialer, "_attempt", lose_the_first)
    link_pair = LinkPair(pair)
    await link_pair.start(pair)
    assert lost == 1
    await link_pair.close()
