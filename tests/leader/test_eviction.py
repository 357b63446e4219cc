"""Which idle deployments make room for a new one."""

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
    ASK,
    SETTINGS,
    Cluster,
    cpu_device,
    model,
    placed,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_an_idle_deployment_makes_room_and_a_busy_one_never(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await placed(cluster, active=1, idle=0.0)
    refused = await cluster.planner.ensure(Ensure("other"))
    assert refused.fault == "too_big"
    assert "demo:latest releasing" in refused.message
    cluster.ready(first, active=0, waiting=0, idle=5.0)
    answer = await cluster.planner.ensure(Ensure("other"))
    assert answer.verdict is Verdict.WAIT
    assert [request.deployment for _, request in cluster.asked("unload") if isinstance(request, Unload)] == [
        first
    ]
    assert any("makes room" in reason for reason in answer.reasons)


async def test_memory_that_is_being_given_back_counts_as_there_in_the_arithmetic(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    deployment = await placed(cluster)
    huge = replace(ASK, model="other", context=32768)
    told = (await cluster.planner.preview(huge)).message
    # It has ended, and its owners still show its grants.
    cluster.nodes["a"].endpoints.pop(deployment)
    cluster.changed()
    assert cluster.granted() > GIB // 2
    assert (await cluster.planner.preview(huge)).message == told


async def test_pinned_and_waiting_ones_stay(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await placed(cluster, pinned=True, idle=500.0)
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    cluster.ready(first, pinned=False, waiting=1)
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    assert not cluster.asked("unload")


async def test_of_two_alike_that_are_pinned_one_makes_room(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    first = await placed(cluster, pinned=True, idle=500.0)
    alike = replace(cluster.nodes["a"].endpoints[first], id="alike", idle=5.0, placed=())
    cluster.nodes["c"].endpoints["alike"] = alike
    assert (await cluster.planner.ensure(Ensure("other"))).verdict is Verdict.WAIT
    assert [request.deployment for _, request in cluster.asked("unload") if isinstance(request, Unload)] == [
        first
    ]


async def test_one_that_was_just_used_refuses_and_is_kept(cluster: Cluster) -> None:
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    await placed(cluster, idle=500.0)

    async def hook(method: str, request: object) -> object | None:
        return Done(False, "a request came") if method == "unload" else None

    cluster.nodes["a"].hook = hook
    assert (await cluster.planner.ensure(Ensure("other"))).fault == "too_big"
    assert len(cluster.asked("deploy")) == 1


async def test_a_head_that_dies_while_it_unloads_holds_up_no_placement(cluster: Cluster) -> None:
    cluster.nodes["c"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape(4, 20 * MIB)
    other = await placed(cluster, Ensure("other"), idle=600.0)
    asked = asyncio.Event()

    async def stopped(method: str, request: object) -> object | None:
        if method == "unload":
            asked.set()
            await asyncio.Event().wait()
        return None

    cluster.nodes["c"].hook = stopped
    cluster.add("d", 450 * MIB)
    cluster.nodes["a"].models.append(model("large:latest", "d3"))
    cluster.shapes["d3"] = shape(16, 80 * MIB)
    waiting = asyncio.create_task(cluster.planner.ensure(Ensure("large")))
    await asked.wait()
    del cluster.nodes["c"]
    cluster.add("e", 900 * MIB)
    cluster.changed()
    answer = await asyncio.wait_for(waiting, 5)
    assert answer.verdict in (Verdict.WAIT, Verdict.PLANNING), answer
    assert [node for node, _ in cluster.asked("unload")] == ["c"], other


async def test_the_longest_idle_goes_and_no_more_than_must() -> None:
    cluster = Cluster(SETTINGS)
    names = ["one", "two", "three", "four"]
    cluster.add("a", 3200 * MIB, *(model(f"{name}:latest", name) for name in names))
    for name in names:
        cluster.shapes[name] = shape()
    await cluster.planner.start()
    held = {}
    for age, name in enumerate(names[:3]):
        held[name] = await placed(cluster, Ensure(name), idle=1000.0 - 300 * age)
    answer = await cluster.planner.ensure(Ensure("four"))
    assert answer.verdict is Verdict.WAIT
    assert [r.deployment for _, r in cluster.asked("unload") if isinstance(r, Unload)] == [held["one"]]
    await cluster.planner.close()


async def test_of_forty_idle_ones_only_what_must_goes() -> None:
    cluster = Cluster(SETTINGS)
    names = [f"m{number:02}" for number in range(40)]
    cluster.add("a", 5000 * MIB, *(model(f"{name}:latest", name) for name in [*names, "big"]))
    for name in names:
        cluster.shapes[name] = shape(4, 10 * MIB, 10 * MIB, n_embd=256, n_vocab=8000)
    cluster.shapes["big"] = shape(16, 40 * MIB, 20 * MIB)
    await cluster.planner.start()
    held = [
        await placed(cluster, Ensure(name), idle=6000.0 - 100 * age, bytes=0)
        for age, name in enumerate(names)
    ]
    free = cluster.nodes["a"].ledger.devices()[0].available
    answer = await cluster.planner.ensure(Ensure("big"))
    assert answer.verdict is Verdict.WAIT
    ended = [request.deployment for _, request in cluster.asked("unload") if isinstance(request, Unload)]
    (big,) = [request for _, request in cluster.asked("deploy") if isinstance(request, Deploy)][40:]
    needed = sum(sum(devices.values()) for devices in big.plan.bytes_by_owner().values())
    each = sum(grant.bytes for grant in cluster.nodes["a"].ledger.grants() if grant.deployment == held[-1])
    assert 1 <= len(ended) <= -(-(needed - free) // each) + 1
    # Those idle the longest.
    assert set(ended) == set(held[: len(ended)])
    await cluster.planner.close()


def test_the_same_weights_under_another_name_stay() -> None:
    mine, other = (
        Endpoint(name, f"{name}:latest", "d1", Backend.LOCAL, State.READY) for name in ("mine", "other")
    )
    loaded = [record("a", endpoints=(mine, other))]
    assert loaded_of(loaded, "Mine:latest", "Mine:latest") == (("a", "mine"),)
    assert loaded_of(loaded, "other", "") == (("a", "other"),)
    assert loaded_of(loaded, "third:latest", "third:latest") == ()


async def test_drop_ends_what_is_idle(cluster: Cluster) -> None:
    first = await placed(cluster, active=1)
    dropped = await cluster.planner.unload(Drop("demo"))
    assert dropped.refused == ((first, "there are requests in it"),)
    dropped = await cluster.planner.unload(Drop("demo", force=True))
    assert dropped.ended == (first,)
    assert cluster.granted() == 0
    # What was just ended is no longer counted on.
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_memory_that_is_being_given_back_is_waited_for(cluster: Cluster) -> None:
    deployment = await placed(cluster)
    # The head is gone with its endpoint, and the owners have not heard so yet.
    cluster.ready(deployment, state=State.FAILED, reason="a worker died")
    cluster.now += 30.0
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING
    assert "releasing" in answer.message
    assert (await cluster.planner.preview(ASK)).plan is not None
    for node in cluster.nodes.values():
        node.ledger.end_deployment(deployment, "silent")
        node.ledger.ended(deployment)
    cluster.changed()
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_worse_plan_waits_a_moment_for_memory_that_is_about_to_be_free() -> None:
    cluster = Cluster(Settings(placement=PlacementSettings(context=4096, slots=8)))
    cluster.add("a", 1400 * MIB, model())
    cluster.add("b", 1100 * MIB, model())
    await cluster.planner.start()
    deployment = await placed(cluster)
    cluster.ready(deployment, state=State.FAILED, reason="a worker died")
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "releasing" in answer.message
    # Its owner does not give it back: then it goes without.
    cluster.now += 2.1
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.WAIT
    plans = [r.plan for _, r in cluster.asked("deploy") if isinstance(r, Deploy)]
    assert [(plan.head, plan.run.slots) for plan in plans] == [("a", 4), ("b", 2)]
    await cluster.planner.close()


@pytest.mark.parametrize(("resident", "evicted"), [(100 * MIB, False), (2 * GIB, True), (-1, True)])
async def test_an_ollamas_model_makes_no_more_room_than_its_process_holds(
    resident: int, evicted: bool
) -> None:
    cluster = Cluster(SETTINGS)
    device = replace(cpu_device(4 * GIB), free=500 * MIB)
    node = cluster.add("a", 0, model(), devices=(device,))
    placed_there = Placed("a", "CPU", 0, 17, 2 * GIB, resident)
    node.endpoints["ollama:other"] = Endpoint(
        "ollama:other", "other", "d2", Backend.OLLAMA, State.READY, idle=999.0, placed=(placed_there,)
    )
    await cluster.planner.start()
    answer = await cluster.planner.ensure(ASK)
    assert bool(cluster.asked("unload")) is evicted
    if not evicted:
        assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    await cluster.planner.close()
