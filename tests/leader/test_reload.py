"""What runs with other options than a caller names."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sollold.engines.commands import Deploy, Unload
from sollold.leader.leader import CLOSE_AFTER
from sollold.leader.messages import Ensure, Verdict
from sollold.leader.wish import PlacementWish
from sollold.settings.schema import PlacementSettings
from tests.leader.cluster import (
    ASK,
    SETTINGS,
    Cluster,
    model,
    placed,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_a_larger_context_reloads_only_what_is_idle(cluster: Cluster) -> None:
    cluster.add("d", 2 * GIB)
    first = await placed(cluster, active=1)
    answer = await cluster.planner.ensure(replace(ASK, context=8192))
    assert (answer.verdict, answer.deployment) == (Verdict.PLANNING, "")
    assert not cluster.asked("unload")
    cluster.ready(first, active=0, idle=3.0)
    answer = await cluster.planner.ensure(replace(ASK, context=8192))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    cluster.ready(answer.deployment)
    # And back: who needs less uses what is there.
    smaller = await cluster.planner.ensure(replace(ASK, context=1024))
    assert (smaller.verdict, smaller.deployment) == (Verdict.USE, answer.deployment)


async def test_a_context_that_grows_in_small_steps_reloads_seldom(cluster: Cluster) -> None:
    cluster.add("d", 3 * GIB)
    await placed(cluster, idle=3.0)
    for context in range(2100, 8000, 300):
        answer = await cluster.planner.ensure(replace(ASK, context=context))
        cluster.ready(answer.deployment, idle=3.0)
        (endpoint,) = [e for node in cluster.nodes.values() for e in node.endpoints.values()]
        assert endpoint.context >= context
    contexts = [r.plan.run.context for _, r in cluster.asked("deploy") if isinstance(r, Deploy)]
    assert contexts == [2048, 4096, 8192]


async def test_what_finds_no_room_for_more_is_given_what_was_named() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 1250 * MIB, model())
    await cluster.planner.start()
    await placed(cluster, idle=3.0)
    contexts = []
    for context in range(2304, 32768, 256):
        answer = await cluster.planner.ensure(replace(ASK, context=context))
        if answer.verdict is Verdict.USE and "does not fit" in answer.reasons[0]:
            break
        cluster.ready(answer.deployment, idle=3.0)
        contexts.append(cluster.nodes["a"].endpoints[answer.deployment].context)
    # Powers of two as long as they fit, then exactly what is named.
    assert contexts[0] == 4096
    assert contexts[-1] == context - 256
    assert contexts[-1] & (contexts[-1] - 1)
    await cluster.planner.close()


async def test_what_is_named_otherwise_is_loaded_anew_when_idle(cluster: Cluster) -> None:
    first = await placed(cluster, active=1)
    for named, words in (
        (replace(ASK, slots=2), "2 requests at a time"),
        (replace(ASK, type_k="q8_0", type_v="q8_0"), "a KV cache in q8_0"),
        (replace(ASK, placement=PlacementWish(policy="even")), "the policy even"),
        (replace(ASK, fixed=(("host-a", 5), ("host-b", 6), ("host-c", 6))), "host-b 6"),
    ):
        answer = await cluster.planner.ensure(named)
        assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
        assert words in answer.message
        assert "in use" in answer.message
    preview = await cluster.planner.preview(replace(ASK, slots=2))
    assert preview.verdict is Verdict.REFUSED
    assert preview.plan is not None
    cluster.ready(first, active=0, idle=3.0)
    answer = await cluster.planner.ensure(replace(ASK, type_k="q8_0", type_v="q8_0"))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    assert any("without a KV cache in q8_0" in reason for reason in answer.reasons)
    # While it loads another request is not taken for the same.
    assert (
        await cluster.planner.ensure(replace(ASK, placement=PlacementWish(policy="even")))
    ).fault == "unavailable"
    cluster.ready(answer.deployment, idle=3.0)
    # Who names nothing, or what it has, uses what is there.
    for same in (
        ASK,
        replace(ASK, type_k="q8_0"),
        replace(ASK, slots=1),
        replace(ASK, placement=PlacementWish(policy="fastest")),
    ):
        again = await cluster.planner.ensure(same)
        assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_layers_fixed_by_a_nodes_id_are_those_fixed_by_its_name(cluster: Cluster) -> None:
    first = await placed(cluster, replace(ASK, fixed=(("host-a", 5), ("host-b", 6), ("host-c", 6))), active=1)
    same = await cluster.planner.ensure(replace(ASK, fixed=(("a", 5), ("b", 6), ("c", 6))))
    assert (same.verdict, same.deployment) == (Verdict.USE, first)
    other = await cluster.planner.ensure(replace(ASK, fixed=(("a", 6), ("b", 5), ("c", 6))))
    assert "without the layers host-a 6, host-b 5, host-c 6 and is in use" in other.message


async def test_fewer_slots_than_named_are_no_reason_to_load_it_again_and_again(cluster: Cluster) -> None:
    many = replace(ASK, slots=64)
    answer = await cluster.planner.ensure(many)
    cluster.ready(answer.deployment, idle=3.0)
    assert cluster.nodes["a"].endpoints[answer.deployment].slots < 64
    again = await cluster.planner.ensure(many)
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_what_can_not_be_had_as_named_leaves_what_runs(cluster: Cluster) -> None:
    first = await placed(cluster, idle=3.0)
    answer = await cluster.planner.ensure(replace(ASK, fixed=(("host-a", 17),)))
    assert answer.verdict is Verdict.REFUSED
    assert not cluster.asked("unload")
    assert first in cluster.nodes["a"].endpoints


async def test_two_wishes_at_once_are_not_taken_for_one(cluster: Cluster) -> None:
    even, fast = await asyncio.gather(
        cluster.planner.ensure(replace(ASK, placement=PlacementWish(policy="even"))),
        cluster.planner.ensure(replace(ASK, placement=PlacementWish(policy="fastest"))),
    )
    assert even.verdict is Verdict.WAIT
    assert fast.verdict is Verdict.REFUSED
    assert "the policy fastest" in fast.message
    (request,) = [request for _, request in cluster.asked("deploy") if isinstance(request, Deploy)]
    assert request.plan.asked.policy == "even"


async def test_more_than_the_training_is_no_reason_to_reload(cluster: Cluster) -> None:
    cluster.add("d", 2 * GIB)
    answer = await cluster.planner.ensure(replace(ASK, context=100_000))
    assert answer.verdict is Verdict.WAIT
    cluster.ready(answer.deployment, idle=10.0)
    again = await cluster.planner.ensure(replace(ASK, context=100_000))
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_a_context_that_fits_nowhere_keeps_what_runs(cluster: Cluster) -> None:
    first = await placed(cluster, idle=3.0)
    answer = await cluster.planner.ensure(replace(ASK, context=32768))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    assert answer.reasons == ("a context of 32768 tokens does not fit anywhere",)
    assert not cluster.asked("unload")


async def test_a_context_that_does_not_fit_beside_others_that_stay_names_them(cluster: Cluster) -> None:
    await placed(cluster, idle=3.0)
    cluster.add("d", 250 * MIB, model("other:latest", "d2"))
    cluster.shapes["d2"] = shape(4, 20 * MIB)
    await placed(cluster, Ensure("other"), pinned=True)
    answer = await cluster.planner.ensure(replace(ASK, context=32768))
    assert answer.verdict is Verdict.USE
    (reason,) = answer.reasons
    assert "does not fit beside other:latest (it is kept loaded by its keep_alive)" in reason


USUAL = replace(SETTINGS, placement=PlacementSettings(context=8192, slots=1))


async def roomy(room: int) -> Cluster:
    """One machine; callers who name no context get 8192 tokens."""
    cluster = Cluster(USUAL)
    cluster.add("a", room, model())
    await cluster.planner.start()
    return cluster


async def test_who_names_no_context_gets_the_settings_though_less_is_loaded() -> None:
    cluster = await roomy(2 * GIB)
    small = await placed(cluster, replace(ASK, context=2048), idle=3.0)
    answer = await cluster.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment != small) == (Verdict.WAIT, True)
    cluster.ready(answer.deployment, idle=3.0)
    (endpoint,) = cluster.nodes["a"].endpoints.values()
    assert endpoint.context == 8192
    for ask in (ASK, replace(ASK, context=2048)):
        again = await cluster.planner.ensure(ask)
        assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)
    await cluster.planner.close()


async def test_what_got_less_than_the_settings_for_want_of_memory_is_not_loaded_anew() -> None:
    cluster = await roomy(1000 * MIB)
    first = await placed(cluster, idle=3.0)
    assert cluster.nodes["a"].endpoints[first].context < 8192
    again = await cluster.planner.ensure(ASK)
    assert (again.verdict, again.deployment) == (Verdict.USE, first)
    assert "loaded there" in again.reasons[0]
    await cluster.planner.close()


@pytest.mark.parametrize("named", [0, 6000])
async def test_what_needs_more_context_waits_while_the_small_one_loads_or_is_in_use(named: int) -> None:
    cluster = await roomy(1500 * MIB)
    small = await cluster.planner.ensure(replace(ASK, context=2048))
    larger = replace(ASK, context=named)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.PLANNING and "2048" in answer.message
    cluster.ready(small.deployment, active=1, idle=0.0)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.PLANNING and "in use" in answer.message
    assert not cluster.asked("unload")
    cluster.ready(small.deployment, active=0, idle=1.0)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.WAIT
    (endpoint,) = cluster.nodes["a"].endpoints.values()
    assert endpoint.context >= (named or 8192)
    await cluster.planner.close()


async def test_where_memory_is_free_another_is_loaded_beside_the_small_one() -> None:
    cluster = await roomy(4 * GIB)
    small = await placed(cluster, replace(ASK, context=2048), active=1, idle=0.0)
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.WAIT
    assert any("beside" in reason for reason in answer.reasons)
    assert set(cluster.nodes["a"].endpoints) == {small, answer.deployment}
    await cluster.planner.close()


async def test_one_that_is_never_idle_lets_no_new_requests_in_at_last() -> None:
    cluster = await roomy(1500 * MIB)
    small = await placed(cluster, replace(ASK, context=2048), active=1, idle=0.0)
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING
    for _ in range(4):
        cluster.now += CLOSE_AFTER / 3
        assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING
    assert cluster.nodes["a"].endpoints[small].closing
    cluster.nodes["a"].unload(Unload(cluster.term, small, force=True))
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_a_reload_keeps_what_was_named_before_and_the_pin() -> None:
    cluster = await roomy(2 * GIB)
    named = replace(ASK, context=2048, type_k="q8_0", type_v="q8_0", keep_alive=-1.0)
    named = replace(named, placement=PlacementWish(policy="even"))
    await placed(cluster, named, idle=3.0, pinned=True)
    answer = await cluster.planner.ensure(replace(ASK, context=4096))
    assert answer.verdict is Verdict.WAIT
    order = cluster.asked("deploy")[-1][1]
    assert isinstance(order, Deploy)
    assert order.keep_alive == -1.0
    asked = order.plan.asked
    assert (asked.type_k, asked.type_v, asked.policy, asked.context) == ("q8_0", "q8_0", "even", 4096)
    await cluster.planner.close()
