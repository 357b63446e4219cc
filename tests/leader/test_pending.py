"""An unload cancels pending placements and file transfers."""

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
from tests.leader.cluster import ENSURE, SETTINGS, Cluster, model
from tests.leader.test_prefetch import answer_fetches, small_machines
from tests.placement.fleets import GIB

FORCED = Drop("demo", force=True)


@pytest.fixture(autouse=True)
def no_fetch_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FETCH_LOOK", 0.0)


def fetching_cluster() -> Cluster:
    """A cluster whose node d is fetching the file."""
    cluster = small_machines()
    cluster.add("d", 4 * GIB)
    answer_fetches(cluster, "d", *[Fetched(completed=1, total=4)] * 9)
    return cluster


async def test_a_forced_unload_cancels_the_transfer_and_its_waiting_requests() -> None:
    cluster = fetching_cluster()

    async def lead(method: str, request: object) -> object | None:
        return await cluster.planner.ensure(request) if isinstance(request, Ensure) else None

    cluster.nodes["a"].hook = lead
    waiting = asyncio.create_task(LeaderClient(cluster, cluster).ensure(ENSURE, lambda message: None))
    await until(lambda: cluster.requests("fetch"))
    refused = await cluster.planner.unload(Drop("demo"))
    assert "is being placed for a request that waits" in refused.refused[0][1] and not refused.cancelled
    dropped = await cluster.planner.unload(FORCED)
    assert dropped.cancelled and not dropped.ended and not dropped.refused
    stop = Fetch(cluster.term, "demo:latest", "d1", stop=True)
    assert cluster.requests("fetch")[-1] == ("d", stop)
    with pytest.raises(Refusal, match="unloaded with --force") as refusal:
        await waiting
    assert refusal.value.fault is Fault.INTERRUPTED and refusal.value.final
    assert cluster.requests("fetch")[-1] == ("d", stop) and not cluster.requests("deploy")
    assert not (await cluster.planner.unload(FORCED)).cancelled, "there is nothing left to cancel"
    cluster.now += 0.1
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING, "new requests are served"


async def test_a_transfer_without_waiting_requests_is_cancelled_without_force() -> None:
    cluster = fetching_cluster()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    cluster.now += 10
    assert (await cluster.planner.unload(Drop("demo"))).cancelled


async def test_a_cancelled_placement_releases_its_reservations() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 4 * GIB, model())
    reached = asyncio.Event()

    async def hang(method: str, request: object) -> object | None:
        if method == "deploy":
            reached.set()
            await asyncio.Event().wait()
        return None

    node.hook = hang
    waiting = asyncio.create_task(cluster.planner.ensure(ENSURE))
    await reached.wait()
    assert (await cluster.planner.unload(Drop("demo"))).refused and not waiting.done()
    assert (await cluster.planner.unload(FORCED)).cancelled
    answer = await waiting
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, Fault.INTERRUPTED)
    assert cluster.granted() == 0
    node.hook = None
    cluster.now += 1.0
    late = replace(ENSURE, waited=5.0)
    assert (await cluster.planner.ensure(late)).verdict is Verdict.REFUSED, (
        "it was waiting at the time of the unload"
    )
    assert (await cluster.planner.ensure(Ensure("demo"))).verdict is Verdict.WAIT
