"""Requests with options that differ from those of the running deployment."""

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
    ENSURE,
    SETTINGS,
    Cluster,
    load,
    model,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_a_larger_context_reloads_only_an_idle_deployment(cluster: Cluster) -> None:
    cluster.add("d", 2 * GIB)
    first = await load(cluster, active=1)
    answer = await cluster.planner.ensure(replace(ENSURE, context=8192))
    assert (answer.verdict, answer.deployment) == (Verdict.PLANNING, "")
    assert not cluster.requests("unload")
    cluster.ready(first, active=0, idle=3.0)
    answer = await cluster.planner.ensure(replace(ENSURE, context=8192))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    cluster.ready(answer.deployment)
    # A smaller context uses the larger deployment.
    smaller = await cluster.planner.ensure(replace(ENSURE, context=1024))
    assert (smaller.verdict, smaller.deployment) == (Verdict.USE, answer.deployment)


async def test_a_slowly_growing_context_causes_few_reloads(cluster: Cluster) -> None:
    cluster.add("d", 3 * GIB)
    await load(cluster, idle=3.0)
    for context in range(2100, 8000, 300):
        answer = await cluster.planner.ensure(replace(ENSURE, context=context))
        cluster.ready(answer.deployment, idle=3.0)
        (endpoint,) = [e for node in cluster.nodes.values() for e in node.endpoints.values()]
        assert endpoint.context >= context
    contexts = [r.plan.run.context for _, r in cluster.requests("deploy") if isinstance(r, Deploy)]
    assert contexts == [2048, 4096, 8192]


async def test_the_exact_context_is_used_if_a_power_of_two_does_not_fit() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 1250 * MIB, model())
    await cluster.planner.start()
    await load(cluster, idle=3.0)
    contexts = []
    for context in range(2304, 32768, 256):
        answer = await cluster.planner.ensure(replace(ENSURE, context=context))
        if answer.verdict is Verdict.USE and "does not fit" in answer.reasons[0]:
            break
        cluster.ready(answer.deployment, idle=3.0)
        contexts.append(cluster.nodes["a"].endpoints[answer.deployment].context)
    # Powers of two while they fit, then exactly the requested context.
    assert contexts[0] == 4096
    assert contexts[-1] == context - 256
    assert contexts[-1] & (contexts[-1] - 1)
    await cluster.planner.close()


async def test_a_deployment_with_other_options_is_reloaded_when_idle(cluster: Cluster) -> None:
    first = await load(cluster, active=1)
    for named, words in (
        (replace(ENSURE, slots=2), "2 requests at a time"),
        (replace(ENSURE, type_k="q8_0", type_v="q8_0"), "a KV cache in q8_0"),
        (replace(ENSURE, placement=PlacementWish(policy="even")), "the policy even"),
        (replace(ENSURE, fixed=(("host-a", 5), ("host-b", 6), ("host-c", 6))), "host-b 6"),
    ):
        answer = await cluster.planner.ensure(named)
        assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
        assert words in answer.message
        assert "in use" in answer.message
    preview = await cluster.planner.preview(replace(ENSURE, slots=2))
    assert preview.verdict is Verdict.REFUSED
    assert preview.plan is not None
    cluster.ready(first, active=0, idle=3.0)
    answer = await cluster.planner.ensure(replace(ENSURE, type_k="q8_0", type_v="q8_0"))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    assert any("without a KV cache in q8_0" in reason for reason in answer.reasons)
    # While it loads, a request with other options is not merged with it.
    assert (
        await cluster.planner.ensure(replace(ENSURE, placement=PlacementWish(policy="even")))
    ).fault == "unavailable"
    cluster.ready(answer.deployment, idle=3.0)
    # Requests without options, or with the same ones, use it.
    for matching in (
        ENSURE,
        replace(ENSURE, type_k="q8_0"),
        replace(ENSURE, slots=1),
        replace(ENSURE, placement=PlacementWish(policy="fastest")),
    ):
        again = await cluster.planner.ensure(matching)
        assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_fixed_layers_may_name_nodes_by_id_or_name(cluster: Cluster) -> None:
    first = await load(
        cluster, replace(ENSURE, fixed=(("host-a", 5), ("host-b", 6), ("host-c", 6))), active=1
    )
    same = await cluster.planner.ensure(replace(ENSURE, fixed=(("a", 5), ("b", 6), ("c", 6))))
    assert (same.verdict, same.deployment) == (Verdict.USE, first)
    other = await cluster.planner.ensure(replace(ENSURE, fixed=(("a", 6), ("b", 5), ("c", 6))))
    assert "without the layers host-a 6, host-b 5, host-c 6 and is in use" in other.message


async def test_fewer_slots_than_requested_do_not_cause_a_reload(cluster: Cluster) -> None:
    many = replace(ENSURE, slots=64)
    answer = await cluster.planner.ensure(many)
    cluster.ready(answer.deployment, idle=3.0)
    assert cluster.nodes["a"].endpoints[answer.deployment].slots < 64
    again = await cluster.planner.ensure(many)
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_an_impossible_request_keeps_the_running_deployment(cluster: Cluster) -> None:
    first = await load(cluster, idle=3.0)
    answer = await cluster.planner.ensure(replace(ENSURE, fixed=(("host-a", 17),)))
    assert answer.verdict is Verdict.REFUSED
    assert not cluster.requests("unload")
    assert first in cluster.nodes["a"].endpoints


async def test_concurrent_requests_with_different_options_are_not_merged(cluster: Cluster) -> None:
    even, fast = await asyncio.gather(
        cluster.planner.ensure(replace(ENSURE, placement=PlacementWish(policy="even"))),
        cluster.planner.ensure(replace(ENSURE, placement=PlacementWish(policy="fastest"))),
    )
    assert even.verdict is Verdict.WAIT
    assert fast.verdict is Verdict.REFUSED
    assert "the policy fastest" in fast.message
    (request,) = [request for _, request in cluster.requests("deploy") if isinstance(request, Deploy)]
    assert request.plan.asked.policy == "even"


async def test_a_context_above_the_training_context_causes_no_reload(cluster: Cluster) -> None:
    cluster.add("d", 2 * GIB)
    answer = await cluster.planner.ensure(replace(ENSURE, context=100_000))
    assert answer.verdict is Verdict.WAIT
    cluster.ready(answer.deployment, idle=10.0)
    again = await cluster.planner.ensure(replace(ENSURE, context=100_000))
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_a_context_that_fits_nowhere_keeps_the_running_deployment(cluster: Cluster) -> None:
    first = await load(cluster, idle=3.0)
    answer = await cluster.planner.ensure(replace(ENSURE, context=32768))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    assert answer.reasons == ("a context of 32768 tokens does not fit anywhere",)
    assert not cluster.requests("unload")


async def test_a_context_that_does_not_fit_beside_pinned_models_names_them(cluster: Cluster) -> None:
    await load(cluster, idle=3.0)
    cluster.add("d", 250 * MIB, model("other:latest", "d2"))
    cluster.shapes["d2"] = shape(4, 20 * MIB)
    await load(cluster, Ensure("other"), pinned=True)
    answer = await cluster.planner.ensure(replace(ENSURE, context=32768))
    assert answer.verdict is Verdict.USE
    (reason,) = answer.reasons
    assert "does not fit beside other:latest (it is kept loaded by its keep_alive)" in reason


LARGE_CONTEXT = replace(SETTINGS, placement=PlacementSettings(context=8192, slots=1))


async def single_machine(room: int) -> Cluster:
    """One machine whose default context is 8192 tokens."""
    cluster = Cluster(LARGE_CONTEXT)
    cluster.add("a", room, model())
    await cluster.planner.start()
    return cluster


async def test_a_request_without_context_gets_the_configured_one() -> None:
    cluster = await single_machine(2 * GIB)
    small = await load(cluster, replace(ENSURE, context=2048), idle=3.0)
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.deployment != small) == (Verdict.WAIT, True)
    cluster.ready(answer.deployment, idle=3.0)
    (endpoint,) = cluster.nodes["a"].endpoints.values()
    assert endpoint.context == 8192
    for ask in (ENSURE, replace(ENSURE, context=2048)):
        again = await cluster.planner.ensure(ask)
        assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)
    await cluster.planner.close()


async def test_a_context_reduced_for_lack_of_memory_causes_no_reload() -> None:
    cluster = await single_machine(1000 * MIB)
    first = await load(cluster, idle=3.0)
    assert cluster.nodes["a"].endpoints[first].context < 8192
    again = await cluster.planner.ensure(ENSURE)
    assert (again.verdict, again.deployment) == (Verdict.USE, first)
    assert "loaded there" in again.reasons[0]
    await cluster.planner.close()


@pytest.mark.parametrize("named", [0, 6000])
async def test_a_larger_context_waits_while_the_smaller_deployment_is_loading_or_busy(named: int) -> None:
    cluster = await single_machine(1500 * MIB)
    small = await cluster.planner.ensure(replace(ENSURE, context=2048))
    larger = replace(ENSURE, context=named)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.PLANNING and "2048" in answer.message
    cluster.ready(small.deployment, active=1, idle=0.0)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.PLANNING and "in use" in answer.message
    assert not cluster.requests("unload")
    cluster.ready(small.deployment, active=0, idle=1.0)
    answer = await cluster.planner.ensure(larger)
    assert answer.verdict is Verdict.WAIT
    (endpoint,) = cluster.nodes["a"].endpoints.values()
    assert endpoint.context >= (named or 8192)
    await cluster.planner.close()


async def test_a_larger_deployment_is_loaded_beside_the_smaller_one_if_it_fits() -> None:
    cluster = await single_machine(4 * GIB)
    small = await load(cluster, replace(ENSURE, context=2048), active=1, idle=0.0)
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    assert any("beside" in reason for reason in answer.reasons)
    assert set(cluster.nodes["a"].endpoints) == {small, answer.deployment}
    await cluster.planner.close()


async def test_a_deployment_that_is_never_idle_is_eventually_closed() -> None:
    cluster = await single_machine(1500 * MIB)
    small = await load(cluster, replace(ENSURE, context=2048), active=1, idle=0.0)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    for _ in range(4):
        cluster.now += CLOSE_AFTER / 3
        assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    assert cluster.nodes["a"].endpoints[small].closing
    cluster.nodes["a"].unload(Unload(cluster.term, small, force=True))
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_a_reload_keeps_earlier_options_and_the_pin() -> None:
    cluster = await single_machine(2 * GIB)
    named = replace(ENSURE, context=2048, type_k="q8_0", type_v="q8_0", keep_alive=-1.0)
    named = replace(named, placement=PlacementWish(policy="even"))
    await load(cluster, named, idle=3.0, pinned=True)
    answer = await cluster.planner.ensure(replace(ENSURE, context=4096))
    assert answer.verdict is Verdict.WAIT
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy)
    assert order.keep_alive == -1.0
    asked = order.plan.asked
    assert (asked.type_k, asked.type_v, asked.policy, asked.context) == ("q8_0", "q8_0", "even", 4096)
    await cluster.planner.close()
