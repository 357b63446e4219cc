"""An unload ends what is pending: a placement under way, a file on its way from another node."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sollold.engines.commands import Fetch, Fetched
from sollold.errors import Fault, Refusal
from sollold.leader import leader
from sollold.leader.client import LeaderClient
from sollold.leader.messages import Drop, Ensure, Verdict
from tests.doubles import until
from tests.leader.cluster import ASK, SETTINGS, Cluster, model
from tests.leader.test_prefetch import fetches, small_ones
from tests.placement.fleets import GIB

FORCED = Drop("demo", force=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FETCH_LOOK", 0.0)


def fetching() -> Cluster:
    """A cluster whose node d is fetching the file for whoever asks."""
    cluster = small_ones()
    cluster.add("d", 4 * GIB)
    fetches(cluster, "d", *[Fetched(completed=1, total=4)] * 9)
    return cluster


async def test_a_copy_for_a_load_ends_with_it_and_those_who_wait_hear_so() -> None:
    cluster = fetching()

    async def leads(method: str, request: object) -> object | None:
        return await cluster.planner.ensure(request) if isinstance(request, Ensure) else None

    cluster.nodes["a"].hook = leads
    waiting = asyncio.create_task(LeaderClient(cluster, cluster).ensure(ASK, lambda message: None))
    await until(lambda: cluster.asked("fetch"))
    refused = await cluster.planner.unload(Drop("demo"))
    assert "is being placed for a request that waits" in refused.refused[0][1] and not refused.cancelled
    dropped = await cluster.planner.unload(FORCED)
    assert dropped.cancelled and not dropped.ended and not dropped.refused
    stop = Fetch(cluster.term, "demo:latest", "d1", stop=True)
    assert cluster.asked("fetch")[-1] == ("d", stop)
    with pytest.raises(Refusal, match="unloaded with --force") as told:
        await waiting
    assert told.value.fault is Fault.INTERRUPTED and told.value.final
    assert cluster.asked("fetch")[-1] == ("d", stop) and not cluster.asked("deploy")
    assert not (await cluster.planner.unload(FORCED)).cancelled, "it is cancelled once"
    cluster.now += 0.1
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING, "who asks anew is served"


async def test_a_copy_that_nobody_waits_for_any_more_needs_no_force() -> None:
    cluster = fetching()
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING
    cluster.now += 10
    assert (await cluster.planner.unload(Drop("demo"))).cancelled


async def test_a_placement_under_way_ends_and_gives_back_what_it_reserved() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 4 * GIB, model())
    reached = asyncio.Event()

    async def hang(method: str, request: object) -> object | None:
        if method == "deploy":
            reached.set()
            await asyncio.Event().wait()
        return None

    node.hook = hang
    waiting = asyncio.create_task(cluster.planner.ensure(ASK))
    await reached.wait()
    assert (await cluster.planner.unload(Drop("demo"))).refused and not waiting.done()
    assert (await cluster.planner.unload(FORCED)).cancelled
    told = await waiting
    assert (told.verdict, told.fault) == (Verdict.REFUSED, Fault.INTERRUPTED)
    assert cluster.granted() == 0
    node.hook = None
    cluster.now += 1.0
    late = replace(ASK, waited=5.0)
    assert (await cluster.planner.ensure(late)).verdict is Verdict.REFUSED, "it waited at that time"
    assert (await cluster.planner.ensure(Ensure("demo"))).verdict is Verdict.WAIT
