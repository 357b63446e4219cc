"""The reach check finds live nodes that accept no connections, from both sides."""

from __future__ import annotations

import asyncio

import pytest

from sollold.cluster.net.reach_check import ReachCheck, Reached, ReachRequest, Unreached
from tests.cluster.shells import IDS, Pair
from tests.doubles import FakeView, World, free_port, record


def checks(pair: Pair) -> list[ReachCheck]:
    """A check for each of two nodes that see each other alive."""
    records = [record(node) for node in IDS[:2]]
    result = []
    world = World()
    for index, me in enumerate(records):
        check = ReachCheck(FakeView(me, world), pair.reach[index], pair.calls[index])
        check.register(pair.peers[index])
        result.append(check)
    return result


async def test_nodes_that_reach_each_other_have_no_findings(pair: Pair) -> None:
    found = checks(pair)
    await pair.start()
    assert [await check.check() for check in found] == [(), ()]


async def test_an_unreachable_node_is_found_by_the_other_and_by_itself(pair: Pair) -> None:
    here, there = checks(pair)
    # It listens, but can't be reached, as behind a firewall.
    pair.where[IDS[1]] = [("127.0.0.1", free_port())]
    await pair.start()
    (outward,) = await here.check()
    assert outward.node == IDS[1] and not outward.inward and "could not be reached" in outward.why
    assert await there.check() == (Unreached(IDS[0], outward.why, inward=True),)


async def test_a_node_without_the_check_is_no_finding(pair: Pair) -> None:
    view = FakeView(record(IDS[0]))
    view.others = {IDS[1]: record(IDS[1])}
    await pair.start()
    assert await ReachCheck(view, pair.reach[0], pair.calls[0]).check() == ()


async def test_a_node_that_only_small_packets_reach_is_found(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.cluster.net.reach_check._CALL_SECONDS", 0.3)
    here, _ = checks(pair)
    sizes = []

    async def lost(caller: str, request: ReachRequest) -> Reached:
        sizes.append(len(request.padding))
        await asyncio.Event().wait()
        return Reached()

    pair.peers[1].method("reach", ReachRequest, lost)
    await pair.start()
    assert await here.check() == (Unreached(IDS[1], "", large=True),)
    assert sizes == [32 * 1024]


async def test_concurrent_checks_share_their_connections(pair: Pair) -> None:
    """Anybody may request the findings, and each check connects to all nodes and back."""
    here, _ = checks(pair)
    asked = 0

    async def count(caller: str, request: ReachRequest) -> Reached:
        nonlocal asked
        asked += 1
        return Reached("blocked" if asked > 1 else "")

    pair.peers[1].method("reach", ReachRequest, count)
    await pair.start()
    first, *others = await asyncio.gather(*(here.check() for _ in range(20)))
    assert asked == 2
    assert first == () and {found[0].why for found in others} == {"blocked"}
