from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import Any

import msgspec
import pytest

from sollold.cluster.net import dialer
from sollold.cluster.net.framing import frame
from sollold.cluster.net.link_stats import BestRate
from sollold.cluster.net.rpc_server import LINK
from sollold.cluster.net.standing_link import FULL, Bye, StandingLinks, neighbours
from tests.cluster.shells import IDS, Pair
from tests.doubles import until


@pytest.mark.parametrize("count", [1, 2, 3, FULL, FULL + 1, 100, 1000])
def test_neighbours_are_mutual_few_and_hold_the_ring_together(count: int) -> None:
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


class Ends:
    """The links of two nodes, and what they told."""

    def __init__(self, pair: Pair) -> None:
        self.told: list[tuple[int, str, str]] = []
        self.measures: list[tuple[int, str, float, float]] = []
        self.links = [self._make(pair, at) for at in range(2)]

    def _make(self, pair: Pair, at: int) -> StandingLinks:
        links = StandingLinks(
            pair.reach[at],
            made=lambda node, address: self.told.append((at, "made", node)),
            lost=lambda node, silent: self.told.append((at, "silent" if silent else "lost", node)),
            measured=lambda node, trip, rate: self.measures.append((at, node, trip, rate)),
        )
        links.port, links.boot = 11436, at + 1
        pair.peers[at].speak(LINK, links.accept)
        return links

    async def start(self, pair: Pair) -> None:
        await pair.start()
        self.links[0].want(frozenset([IDS[1]]))
        self.links[1].want(frozenset([IDS[0]]))
        await until(lambda: self.links[0].up() == (IDS[1],) and self.links[1].up() == (IDS[0],))

    async def close(self) -> None:
        for links in self.links:
            await links.close()


async def test_a_link_is_made_once_and_measured_on_both_sides(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    assert sorted(ends.told) == [(0, "made", IDS[1]), (1, "made", IDS[0])]
    await until(lambda: {at for at, *_ in ends.measures} == {0, 1})
    assert all(0 < trip < 1 for _, _, trip, _ in ends.measures)
    await until(lambda: any(rate > 1e6 for _, _, _, rate in ends.measures), 20)
    await ends.close()


async def test_goodbye_is_no_loss(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    await ends.links[1].close()
    await until(lambda: not ends.links[0].up())
    await asyncio.sleep(0.05)
    assert not [what for _, what, _ in ends.told if what == "lost"]
    await ends.close()


async def test_a_broken_link_is_told_at_once_and_made_again(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    ends.links[1]._links[IDS[0]]._transport.abort()
    assert await until(lambda: (0, "lost", IDS[1]) in ends.told) < 1.0
    await until(lambda: [what for at, what, _ in ends.told if at == 0] == ["made", "lost", "made"])
    await ends.close()


async def test_the_link_of_a_former_process_is_dropped_in_silence(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    ends.links[0].drop_node(IDS[1], boot=2)
    assert ends.links[0].up() == (IDS[1],), "it is the new process's own link"
    ends.links[0].drop_node(IDS[1], boot=3)
    assert ends.links[0].up() == ()
    assert (0, "lost", IDS[1]) not in ends.told
    await ends.close()


async def test_who_is_no_more_wanted_is_let_go(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    ends.links[1].want(frozenset())
    ends.links[0].want(frozenset())
    await until(lambda: not ends.links[0].up() and not ends.links[1].up())
    assert not [what for _, what, _ in ends.told if what == "lost"]
    await ends.close()


@pytest.mark.parametrize(
    "sent", [b"\x00\x00\x00\x02hi", b"\xff\xff\xff\xff", b"\x00\x00\x00\x04\x93\x01\x01\x00"]
)
async def test_rubbish_on_a_link_ends_it(pair: Pair, sent: bytes) -> None:
    ends = Ends(pair)
    await pair.start()
    reader, writer = await asyncio.open_connection(
        *pair.where[IDS[0]][0], ssl=pair.reach[1].context(LINK), server_hostname=f"{IDS[0]}.sollold"
    )
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        # A goodbye: what is wrong with a link is no sign of a death.
        assert await asyncio.wait_for(reader.read(), 5) in (b"", frame(msgspec.msgpack.encode(Bye())))
    writer.close()
    assert ends.links[0].up() == ()
    await ends.close()


async def test_who_ends_a_link_for_what_it_carried_is_not_taken_for_dead(pair: Pair) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    ends.links[1]._links[IDS[0]]._transport.write(frame(b"\xc1"))
    await until(lambda: [what for at, what, _ in ends.told if at == 0] == ["made", "made"])
    assert {what for _, what, _ in ends.told} == {"made"}
    await ends.close()


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (None, "lost"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "lost"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), "silent"),
        (OSError(errno.EHOSTUNREACH, "no route"), "silent"),
    ],
)
async def test_a_link_that_fell_silent_is_told_from_one_that_the_other_side_ended(
    pair: Pair, error: Exception | None, what: str
) -> None:
    ends = Ends(pair)
    await ends.start(pair)
    link = ends.links[0]._links[IDS[1]]
    link.connection_lost(error)
    assert (0, what, IDS[1]) in ends.told
    await ends.close()


def test_a_rate_measured_beside_other_traffic_does_not_count_as_the_links() -> None:
    best = BestRate()
    assert best.add(20e6) == 20e6
    assert best.add(110e6) == 110e6
    assert not best.settled
    assert best.add(30e6) == 110e6
    assert best.settled
    # A link that has become slower shows after a few.
    assert best.add(12e6) == 110e6
    assert best.add(11e6) == 30e6
    assert best.add(12e6) == 12e6


async def test_a_connection_that_is_lost_before_it_is_a_link_is_made_anew(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, lost = dialer._attempt, 0

    async def lose_the_first(*where: Any) -> Any:
        nonlocal lost
        landed = await attempt(*where)
        if not lost:
            landed.transport.abort()
            await until(lambda: landed.lost)
            lost += 1
        return landed

    monkeypatch.setattr(dialer, "_attempt", lose_the_first)
    ends = Ends(pair)
    await ends.start(pair)
    assert lost == 1
    await ends.close()
