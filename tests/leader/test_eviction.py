"""Which idle deployments are evicted for a new one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, State
from sollold.engines.commands import Deploy, Done, Unload
from sollold.leader.messages import Drop, Ensure, Verdict
from sollold.leader.snapshot import loaded_of
from sollold.settings.schema import PlacementSettings, Settings
from tests.doubles import record
from tests.leader.cluster import (
    ENSURE,
    SETTINGS,
    Cluster,
    cpu_device,
    load,
    model,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_an_idle_deployment_is_evicted_but_never_a_busy_one(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await load(cluster, active=1, idle=0.0)
    refused = await cluster.planner.ensure(Ensure("other"))
    assert refused.fault == "too_big"
    assert "unloading demo:latest" in refused.message
    cluster.ready(first, active=0, waiting=0, idle=5.0)
    answer = await cluster.planner.ensure(Ensure("other"))
    assert answer.verdict is Verdict.WAIT
    assert [
        request.deployment for _, request in cluster.requests("unload") if isinstance(request, Unload)
    ] == [first]
    assert any("makes room" in reason for reason in answer.reasons)


async def test_memory_being_released_counts_as_available(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    deployment = await load(cluster)
    huge = replace(ENSURE, model="other", context=32768)
    expected = (await cluster.planner.preview(huge)).message
    # It has ended, but its owners still publish its grants.
    cluster.nodes["a"].endpoints.pop(deployment)
    cluster.changed()
    assert cluster.granted() > GIB // 2
    assert (await cluster.planner.preview(huge)).message == expected


async def test_pinned_and_waiting_deployments_are_kept(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await load(cluster, pinned=True, idle=500.0)
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    cluster.ready(first, pinned=False, waiting=1)
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    assert not cluster.requests("unload")


async def test_a_redundant_pinned_deployment_is_evicted(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await load(cluster, pinned=True, idle=500.0)
    duplicate = replace(cluster.nodes["a"].endpoints[first], id="duplicate", idle=5.0, placed=())
    cluster.nodes["c"].endpoints["duplicate"] = duplicate
    assert (await cluster.planner.ensure(Ensure("other"))).verdict is Verdict.WAIT
    assert [
        request.deployment for _, request in cluster.requests("unload") if isinstance(request, Unload)
    ] == [first]


async def test_a_deployment_that_was_just_used_is_kept(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    await load(cluster, idle=500.0)

    async def hook(method: str, request: object) -> object | None:
        return Done(False, "a request came") if method == "unload" else None

    cluster.nodes["a"].hook = hook
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    assert len(cluster.requests("deploy")) == 1


async def test_a_head_that_dies_while_unloading_delays_no_placement(cluster: Cluster) -> None:
    cluster.nodes["c"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape(4, 20 * MIB)
    other = await load(cluster, Ensure("other"), idle=600.0)
    unload_requested = asyncio.Event()

    async def hang_on_unload(method: str, request: object) -> object | None:
        if method == "unload":
            unload_requested.set()
            await asyncio.Event().wait()
        return None

    cluster.nodes["c"].hook = hang_on_unload
    cluster.add("d", 450 * MIB)
    cluster.nodes["a"].models.append(model("large:latest", "d3"))
    cluster.shapes["d3"] = shape(16, 80 * MIB)
    waiting = asyncio.create_task(cluster.planner.ensure(Ensure("large")))
    await unload_requested.wait()
    del cluster.nodes["c"]
    cluster.add("e", 900 * MIB)
    cluster.changed()
    answer = await asyncio.wait_for(waiting, 5)
    assert answer.verdict in (Verdict.WAIT, Verdict.PLANNING), answer
    assert [node for node, _ in cluster.requests("unload")] == ["c"], other


async def test_only_the_longest_idle_deployment_is_evicted() -> None:
    cluster = Cluster(SETTINGS)
    names = ["one", "two", "three", "four"]
    cluster.add("a", 3200 * MIB, *(model(f"{name}:latest", name) for name in names))
    for name in names:
        cluster.shapes[name] = shape()
    await cluster.planner.start()
    held = {}
    for age, name in enumerate(names[:3]):
        held[name] = await load(cluster, Ensure(name), idle=1000.0 - 300 * age)
    answer = await cluster.planner.ensure(Ensure("four"))
    assert answer.verdict is Verdict.WAIT
    assert [r.deployment for _, r in cluster.requests("unload") if isinstance(r, Unload)] == [held["one"]]
    await cluster.planner.close()


async def test_no_more_idle_deployments_than_needed_are_evicted() -> None:
    cluster = Cluster(SETTINGS)
    names = [f"m{number:02}" for number in range(40)]
    cluster.add("a", 5000 * MIB, *(model(f"{name}:latest", name) for name in [*names, "big"]))
    for name in names:
        cluster.shapes[name] = shape(4, 10 * MIB, 10 * MIB, n_embd=256, n_vocab=8000)
    cluster.shapes["big"] = shape(16, 40 * MIB, 20 * MIB)
    await cluster.planner.start()
    held = [
        await load(cluster, Ensure(name), idle=6000.0 - 100 * age, bytes=0) for age, name in enumerate(names)
    ]
    free = cluster.nodes["a"].ledger.devices()[0].available
    answer = await cluster.planner.ensure(Ensure("big"))
    assert answer.verdict is Verdict.WAIT
    ended = [request.deployment for _, request in cluster.requests("unload") if isinstance(request, Unload)]
    (big,) = [request for _, request in cluster.requests("deploy") if isinstance(request, Deploy)][40:]
    needed = sum(sum(devices.values()) for devices in big.plan.bytes_by_owner().values())
    each = sum(grant.bytes for grant in cluster.nodes["a"].ledger.grants() if grant.deployment == held[-1])
    assert 1 <= len(ended) <= -(-(needed - free) // each) + 1
    # The longest idle ones.
    assert set(ended) == set(held[: len(ended)])
    await cluster.planner.close()


def test_unloading_keeps_the_same_weights_under_another_name() -> None:
    mine, other = (
        Endpoint(name, f"{name}:latest", "d1", Backend.LOCAL, State.READY) for name in ("mine", "other")
    )
    loaded = [record("a", endpoints=(mine, other))]
    assert loaded_of(loaded, "Mine:latest", "Mine:latest") == (("a", "mine"),)
    assert loaded_of(loaded, "other", "") == (("a", "other"),)
    assert loaded_of(loaded, "third:latest", "third:latest") == ()


async def test_an_unload_ends_idle_deployments_unless_forced(cluster: Cluster) -> None:
    first = await load(cluster, active=1)
    dropped = await cluster.planner.unload(Drop("demo"))
    assert dropped.refused == ((first, "there are requests in it"),)
    dropped = await cluster.planner.unload(Drop("demo", force=True))
    assert dropped.ended == (first,)
    assert cluster.granted() == 0
    # The ended deployment is not used any more.
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_memory_being_released_is_waited_for(cluster: Cluster) -> None:
    deployment = await load(cluster)
    # The head's endpoint failed, but the owners have not released the grants yet.
    cluster.ready(deployment, state=State.FAILED, reason="a worker died")
    cluster.now += 30.0
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING
    assert "releasing" in answer.message
    assert (await cluster.planner.preview(ENSURE)).plan is not None
    for node in cluster.nodes.values():
        node.ledger.end_deployment(deployment, "silent")
        node.ledger.ended(deployment)
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_worse_plan_waits_briefly_for_memory_being_released() -> None:
    cluster = Cluster(Settings(placement=PlacementSettings(context=4096, slots=8)))
    cluster.add("a", 1400 * MIB, model())
    cluster.add("b", 1100 * MIB, model())
    await cluster.planner.start()
    deployment = await load(cluster)
    cluster.ready(deployment, state=State.FAILED, reason="a worker died")
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "releasing" in answer.message
    # The owner does not release it: the worse plan is used.
    cluster.now += 2.1
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    plans = [r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy)]
    assert [(plan.head, plan.run.slots) for plan in plans] == [("a", 4), ("b", 2)]
    await cluster.planner.close()


@pytest.mark.parametrize(("resident", "evicted"), [(100 * MIB, False), (2 * GIB, True), (-1, True)])
async def test_evicting_from_ollama_frees_only_the_resident_memory(resident: int, evicted: bool) -> None:
    cluster = Cluster(SETTINGS)
    device = replace(cpu_device(4 * GIB), free=500 * MIB)
    node = cluster.add("a", 0, model(), devices=(device,))
    share = Placed("a", "CPU", 0, 17, 2 * GIB, resident)
    node.endpoints["ollama:other"] = Endpoint(
        "ollama:other", "other", "d2", Backend.OLLAMA, State.READY, idle=999.0, placed=(share,)
    )
    await cluster.planner.start()
    answer = await cluster.planner.ensure(ENSURE)
    assert bool(cluster.requests("unload")) is evicted
    if not evicted:
        assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    await cluster.planner.close()
