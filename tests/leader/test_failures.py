"""Failing loads, nodes that go offline, drain or fail, and memory that is being released."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.engines.commands import Commit, Deploy, Done, Reserve, Reserved, Unload
from sollold.leader import apply, snapshot_maker
from sollold.leader.absent_nodes import BACK_WITHIN, DRAINED, GONE_WITHIN, REMEMBERED
from sollold.leader.leader import Leader
from sollold.leader.messages import Drop, Ensure, Verdict
from sollold.leader.observations import GOOD_SERVICE, LAST_RESORT
from sollold.leader.wish import PlacementWish
from sollold.machine.device import Device, Kind
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from sollold.placement.explain import Shortfall, explain
from tests.leader.cluster import (
    ENSURE,
    SETTINGS,
    Cluster,
    cpu_device,
    fail_deployment,
    load,
    model,
)
from tests.placement.fleets import GIB, MIB


async def test_a_model_that_keeps_failing_is_refused_for_a_while(cluster: Cluster) -> None:
    for _ in range(2):
        answer = await cluster.planner.ensure(ENSURE)
        assert answer.verdict is Verdict.WAIT
        cluster.ready(answer.deployment, state=State.FAILED, reason="bad tensor.")
        for node in cluster.nodes.values():
            node.ledger.end_deployment(answer.deployment, "failed")
            node.ledger.ended(answer.deployment)
        cluster.changed()
    refused = await cluster.planner.ensure(ENSURE)
    assert refused.fault == "unavailable"
    assert "bad tensor" in refused.message
    assert refused.retry_after > 0
    cluster.now += 10.0
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_deployment_that_failed_after_loading_is_placed_again_at_once(cluster: Cluster) -> None:
    for _ in range(5):
        deployment = await load(cluster)
        cluster.ready(deployment, state=State.FAILED, reason="a worker died")
        for node in cluster.nodes.values():
            node.ledger.end_deployment(deployment, "failed")
            node.ledger.ended(deployment)
        cluster.changed()
    assert len(cluster.requests("deploy")) == 5


async def load_and_fail(cluster: Cluster, ask: Ensure, **changes: Any) -> None:
    deployment = await load(cluster, ask)
    cluster.ready(deployment, state=State.FAILED, reason="a worker died", **changes)
    for node in cluster.nodes.values():
        node.ledger.end_deployment(deployment, "failed")
        node.ledger.ended(deployment)
    cluster.changed()


async def test_a_failed_deployment_is_placed_again_with_its_options() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    await cluster.planner.start()
    named = PlacementWish(speculation="ngram")
    options = replace(ENSURE, slots=3, type_k="q8_0", context=1024, placement=named)
    await load_and_fail(cluster, options, answered=True)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy)
    run = order.plan.run
    assert (run.slots, run.type_k, run.request_context) == (3, "q8_0", 1024)
    assert order.plan.drafts_by == "ngram"
    await cluster.planner.close()


async def load_and_lose_head(cluster: Cluster, options: Ensure) -> None:
    """Load the model on ``b`` with these options, then remove ``b``."""
    cluster.nodes["a"].draining = True
    await load(cluster, options)
    cluster.nodes["a"].draining = False
    cluster.changed()
    del cluster.nodes["b"]
    cluster.changed()


@pytest.mark.parametrize("end", ["", "unloaded", "late"])
async def test_a_deployment_lost_with_its_head_is_placed_again_with_its_options(end: str) -> None:
    cluster = Cluster(SETTINGS)
    for node in "ab":
        cluster.add(node, 2 * GIB, model())
    await cluster.planner.start()
    await load_and_lose_head(cluster, replace(ENSURE, slots=3, type_k="q8_0", context=1024))
    if end == "unloaded":
        await cluster.planner.unload(Drop("demo"))
    cluster.now += BACK_WITHIN if end == "late" else 1.0
    # The return of the machine without the deployment changes nothing.
    cluster.add("b", 2 * GIB, model())
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy)
    assert (order.plan.run.slots, order.plan.run.type_k) == ((1, "f16") if end else (3, "q8_0"))
    await cluster.planner.close()


async def test_a_later_deployment_replaces_the_options_of_a_lost_one() -> None:
    cluster = Cluster(SETTINGS)
    for node in "ab":
        cluster.add(node, 2 * GIB, model())
    await cluster.planner.start()
    await load_and_lose_head(cluster, replace(ENSURE, slots=3))
    again = await load(cluster, replace(ENSURE, slots=2))
    del cluster.nodes["a"].endpoints[again]
    cluster.nodes["a"].ledger.end_deployment(again, "idle")
    cluster.nodes["a"].ledger.ended(again)
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy) and order.plan.run.slots == 1
    await cluster.planner.close()


@pytest.mark.parametrize("answered", [False, True])
async def test_a_deployment_that_cannot_run_as_before_is_placed_with_defaults(answered: bool) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    cluster.add("b", 2 * GIB)
    await cluster.planner.start()
    fixed = replace(ENSURE, slots=2, fixed=(("b", 17),))
    await load_and_fail(cluster, fixed, answered=answered)
    if answered:
        del cluster.nodes["b"]
        cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy)
    assert order.plan.run.slots == 1 and set(order.plan.bytes_by_owner()) == {"a"}
    await cluster.planner.close()


async def test_a_new_leader_does_not_count_earlier_failures_as_failed_loads(cluster: Cluster) -> None:
    for _ in range(3):
        deployment = await load(cluster)
        cluster.ready(deployment, state=State.FAILED, reason="a worker died", answered=True)
        for node in cluster.nodes.values():
            node.ledger.end_deployment(deployment, "failed")
            node.ledger.ended(deployment)
        cluster.changed()
    other = Leader(SETTINGS, cluster.seen_by("a"), cluster, cluster, clock=lambda: cluster.now)
    cluster.term = Term(2, "a")
    assert (await other.ensure(ENSURE)).verdict is Verdict.WAIT
    await other.close()


async def test_refusals_for_other_reasons_end_after_a_few_attempts(cluster: Cluster) -> None:
    attempts = 0

    async def hook(method: str, request: object) -> object | None:
        nonlocal attempts
        if method == "reserve":
            attempts += 1
            return Reserved(False, "the node is draining and accepts no new deployments", {"CPU": 450 * MIB})
        return None

    cluster.nodes["b"].hook = hook
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.REFUSED
    assert "draining" in answer.message
    assert attempts <= 6


async def test_a_head_that_could_not_be_reached_is_waited_for(cluster: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        if method == "deploy":
            raise PeerError("a", "the connection broke", transport=True)
        return None

    cluster.nodes["a"].hook = hook
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING
    assert "demo:latest waits for host-a (it could not be reached to load the model" in answer.message
    assert cluster.granted() == 0
    cluster.nodes["a"].hook = None
    cluster.now += 5.0
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_model_whose_head_refuses_it_is_not_called_too_big(cluster: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        return Done(False, "this node has no llama.cpp yet") if method == "deploy" else None

    cluster.nodes["a"].hook = hook
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
    assert "could not be placed: host-a: this node has no llama.cpp yet" in answer.message
    assert answer.retry_after > 0


async def test_a_refusal_for_another_reason_says_nothing_about_memory() -> None:
    """The node has just restarted; its record does not show it yet."""
    cluster = Cluster(SETTINGS)
    gpu = Device("CUDA0", Kind.GPU, "gpu", GIB, GIB, GIB, 0, GIB, 30 * MIB, 500e9, 20e12)
    node = cluster.add("a", 0, model(), devices=(cpu_device(400 * MIB), gpu))
    node.ledger.draining = True
    refused = await cluster.planner.ensure(ENSURE)
    assert refused.verdict is Verdict.REFUSED and "draining" in refused.message
    node.ledger.draining = False
    cluster.now += 60.0
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_reading_a_header_is_retried(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    read_shape, reads = cluster.shape, 0

    async def shape(node: str, model: Model) -> Shape:
        nonlocal reads
        reads += 1
        if reads < 3:
            raise LookupError("the node is busy with a fault")
        return await read_shape(node, model)

    monkeypatch.setattr(cluster, "shape", shape)
    monkeypatch.setattr(snapshot_maker, "SHAPE_PAUSES", (0.0, 0.0, 0.0))
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    assert reads >= 3


async def test_a_refusal_states_why_a_header_cannot_be_read(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shape(node: str, model: Model) -> Shape:
        raise LookupError("/mnt/models does not answer")

    monkeypatch.setattr(cluster, "shape", shape)
    monkeypatch.setattr(snapshot_maker, "SHAPE_PAUSES", (0.0,))
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.REFUSED
    assert "/mnt/models does not answer" in answer.message


async def test_new_requests_wait_for_the_memory_of_a_draining_node(cluster: Cluster) -> None:
    cluster.nodes["b"].models.append(model())
    cluster.nodes["c"].models.append(model())
    cluster.add("d", 450 * MIB)
    deployment = await load(cluster, active=1, idle=0.0)
    head = next(r.plan.head for _, r in cluster.requests("deploy") if isinstance(r, Deploy))
    cluster.nodes[head].draining = True
    cluster.changed()
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "releasing" in answer.message
    for node in cluster.nodes.values():
        node.endpoints.pop(deployment, None)
        node.ledger.end_deployment(deployment, "the daemon is stopping")
        node.ledger.ended(deployment)
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_grants_of_a_dead_head_are_released(cluster: Cluster) -> None:
    cluster.nodes["b"].models.append(model())
    cluster.nodes["c"].models.append(model())
    cluster.add("d", 450 * MIB)
    deployment = await load(cluster)
    plan = next(r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy))
    owners = set(plan.bytes_by_owner()) - {plan.head}
    assert owners
    view = cluster.seen_by("c" if plan.head == "a" else "a")
    other = Leader(SETTINGS, view, cluster, cluster, clock=lambda: cluster.now)
    await other.start()
    del cluster.nodes[plan.head]
    view.term = cluster.term = Term(2, view.here)
    answers = [await other.ensure(ENSURE) for _ in range(2)]
    assert answers[-1].verdict is Verdict.WAIT, answers
    assert all(not node.ledger.holds(deployment) for node in cluster.nodes.values())
    await other.close()


async def test_grants_of_a_head_without_a_record_are_kept(cluster: Cluster) -> None:
    owner = cluster.nodes["b"].ledger
    assert owner.reserve(Reserve(cluster.term, "other-1", "x", {"CPU": 400 * MIB}), cluster.now)[0].ok
    assert owner.commit(Commit("other-1", "x", ("CPU",), "b1"), cluster.now)[0].ok
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING, "the owner ends the grant if its head stays silent"
    assert not cluster.requests("release")
    assert owner.live("other-1")


async def test_a_head_that_dies_before_publishing_is_not_waited_for(cluster: Cluster) -> None:
    cluster.nodes["b"].models.append(model())
    cluster.add("d", 450 * MIB)
    cluster.nodes["a"].draining = True
    first = await cluster.planner.ensure(ENSURE)
    assert (first.verdict, first.node) == (Verdict.WAIT, "b")
    cluster.nodes["a"].draining = False
    del cluster.nodes["b"]
    cluster.add("e", 450 * MIB)
    second = await cluster.planner.ensure(ENSURE)
    assert second.verdict in (Verdict.WAIT, Verdict.PLANNING)
    assert second.deployment != first.deployment


async def test_a_closing_deployment_takes_no_new_requests(cluster: Cluster) -> None:
    deployment = await load(cluster, active=1, idle=0.0, closing=True)
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "releasing" in answer.message
    cluster.nodes["a"].unload(Unload(cluster.term, deployment, force=True))
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_model_that_needs_every_node_waits_for_one_that_just_went_offline(cluster: Cluster) -> None:
    deployment = await load(cluster)
    cluster.now += 1.0
    gone = cluster.nodes.pop("b")
    gone.ledger.end_deployment(deployment, "the daemon is gone")
    gone.ledger.ended(deployment)
    fail_deployment(cluster, deployment, answered=True, culprit="b")
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING
    assert "waits for host-b (it has just gone offline)" in answer.message
    preview = await cluster.planner.preview(ENSURE)
    assert preview.verdict is Verdict.PLANNING
    assert {change.name for change in preview.free} == {"host-a", "host-b", "host-c"}
    # It is back, but has not found its llama.cpp yet.
    gone.build = ""
    cluster.nodes["b"] = gone
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    gone.build = "b1"
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_missing_memory_is_computed_only_for_refusals(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanations: list[str] = []

    def recording_explain(*args: Any) -> Shortfall:
        shortfall = explain(*args)
        explanations.append(shortfall.message)
        return shortfall

    monkeypatch.setattr("sollold.leader.decide.explain", recording_explain)
    del cluster.nodes["c"]
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    assert not explanations, "waiting requests are repeated often"
    cluster.now += BACK_WITHIN
    cluster.changed()
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert explanations == [answer.message]


async def test_a_different_build_is_named_if_the_same_would_help(cluster: Cluster) -> None:
    cluster.nodes["b"].build = "b2"
    refused = await cluster.planner.ensure(ENSURE)
    assert refused.fault == "too_big"
    assert "llama.cpp b1 on host-b, as on the others: it has b2" in refused.message
    cluster.nodes["b"].build = "b1"
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    cluster.nodes["c"].build = "b2"
    # It is not named where it would not help.
    huge = await cluster.planner.ensure(replace(ENSURE, context=32768, slots=8))
    assert "as on the others" not in huge.message


async def test_a_node_that_stays_away_is_not_waited_for(cluster: Cluster) -> None:
    del cluster.nodes["b"]
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    cluster.now += BACK_WITHIN
    cluster.changed()
    refused = await cluster.planner.ensure(ENSURE)
    assert (refused.verdict, refused.fault) == (Verdict.REFUSED, "too_big")
    assert "MiB" in refused.message
    assert "starting host-b again: it has been offline for 1 min" in refused.message
    cluster.now += REMEMBERED
    refused = await cluster.planner.ensure(ENSURE)
    assert (refused.fault, "host-b" in refused.message) == ("too_big", False)


async def test_a_draining_node_is_waited_for_until_it_should_have_restarted(cluster: Cluster) -> None:
    cluster.nodes["b"].draining = True
    cluster.changed()
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "waits for host-b (it is draining)" in answer.message
    cluster.now += SETTINGS.serving.drain_limit + GONE_WITHIN - 1
    gone = cluster.nodes.pop("b")
    cluster.changed()
    cluster.now += BACK_WITHIN - 1
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    gone.draining = False
    cluster.nodes["b"] = gone
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_node_that_stays_draining_is_not_waited_for(cluster: Cluster) -> None:
    cluster.nodes["b"].draining = True
    cluster.changed()
    cluster.now += SETTINGS.serving.drain_limit + GONE_WITHIN
    refused = await cluster.planner.ensure(ENSURE)
    assert (refused.verdict, refused.fault) == (Verdict.REFUSED, "too_big")
    assert "`sollold undrain host-b`: it is draining" in refused.message


async def test_an_unreachable_owner_is_waited_for(cluster: Cluster) -> None:
    cluster.nodes["b"].unreachable = True
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "host-b" in answer.message
    cluster.nodes["b"].unreachable = False
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_the_culprit_of_failed_loads_is_left_out_instead_of_the_head(cluster: Cluster) -> None:
    cluster.add("d", 450 * MIB)
    for _ in range(3):
        answer = await cluster.planner.ensure(ENSURE)
        assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
        fail_deployment(cluster, answer.deployment, culprit="b")
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
    plan = [r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy)][-1]
    assert set(plan.bytes_by_owner()) == {"a", "c", "d"}


async def test_a_head_that_hung_is_replaced_if_another_is_possible(cluster: Cluster) -> None:
    cluster.add("d", 450 * MIB)
    for name in ("b", "c"):
        cluster.nodes[name].models.append(model())
    answer = await cluster.planner.ensure(ENSURE)
    first = answer.node
    fail_deployment(cluster, answer.deployment, hung=True)
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    assert answer.node != first


async def test_a_failing_node_is_retried_if_there_is_no_alternative(
    cluster: Cluster,
) -> None:
    for _ in range(6):
        answer = await cluster.planner.ensure(ENSURE)
        assert answer.verdict is Verdict.WAIT, answer
        fail_deployment(cluster, answer.deployment, culprit="b")
        cluster.now += LAST_RESORT
    cluster.now -= 1
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    cluster.now += 1
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


@pytest.mark.parametrize(
    ("failure", "tries"),
    [
        ({}, ["a", "a", "b"]),
        ({"crashed": True, "reason": "it exited with code 1"}, ["a", "a", "b"]),
        ({"crashed": True, "reason": "it was terminated by SIGSEGV"}, ["a", "b", "a"]),
    ],
)
async def test_another_node_with_the_file_is_tried_if_a_model_fails_to_start_on_one(
    failure: dict[str, Any], tries: list[str]
) -> None:
    cluster = Cluster(SETTINGS)
    await cluster.planner.start()
    for name in ("a", "b"):
        cluster.add(name, 4 * GIB, model())
    tried: list[str] = []
    while len(tried) < 3:
        answer = await cluster.planner.ensure(ENSURE)
        if answer.verdict is Verdict.WAIT:
            tried.append(answer.node)
            fail_deployment(cluster, answer.deployment, culprit=answer.node, **failure)
        cluster.now += max(1.0, answer.retry_after)
    assert tried == tries
    await cluster.planner.close()


async def test_a_model_that_fails_to_start_excludes_no_other_from_its_node() -> None:
    cluster = Cluster(SETTINGS)
    await cluster.planner.start()
    cluster.shapes["d2"] = cluster.shapes["d1"]
    cluster.add("a", 4 * GIB, model(), model("broken:latest", "d2"))
    for _ in range(6):
        answer = await cluster.planner.ensure(Ensure("broken"))
        assert answer.verdict is Verdict.WAIT, answer
        fail_deployment(cluster, answer.deployment, culprit="a")
        assert cluster.planner._observations._left_out(cluster.live(), "d1", cluster.now) == {}
        cluster.now += 300.0
    good = await cluster.planner.ensure(ENSURE)
    assert good.verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_start_failures_of_different_models_exclude_their_node() -> None:
    cluster = Cluster(SETTINGS)
    await cluster.planner.start()
    node = cluster.add("a", 4 * GIB, model())
    for number in range(3):
        name, digest = f"model{number}", f"m{number}"
        cluster.shapes[digest] = cluster.shapes["d1"]
        node.models.append(model(f"{name}:latest", digest))
        fail_deployment(cluster, (await cluster.planner.ensure(Ensure(name))).deployment, culprit="a")
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    await cluster.planner.close()


async def test_a_node_whose_deployments_keep_failing_is_avoided(
    cluster: Cluster,
) -> None:
    # Without an alternative it is used nevertheless.
    for _ in range(4):
        fail_deployment(cluster, await load(cluster), culprit="b")
    cluster.add("d", 450 * MIB)
    await load(cluster)
    plan = [r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy)][-1]
    assert set(plan.bytes_by_owner()) == {"a", "c", "d"}


async def test_a_node_is_trusted_again_after_minutes_without_failure(cluster: Cluster) -> None:
    for _ in range(3):
        fail_deployment(cluster, await load(cluster), culprit="b")
    deployment = await load(cluster)
    cluster.now += GOOD_SERVICE
    cluster.changed()
    fail_deployment(cluster, deployment, culprit="b")
    cluster.add("d", 450 * MIB)
    await load(cluster)
    plan = [r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy)][-1]
    assert "b" in plan.bytes_by_owner()


async def test_a_draining_head_that_is_needed_is_waited_for(cluster: Cluster) -> None:
    cluster.nodes["b"].models.append(model())
    deployment = await load(cluster)
    head = next(node for node in cluster.nodes.values() if deployment in node.endpoints)
    # The deploy order is recent, so the leader still remembers it.
    cluster.now += 1.0
    head.draining = True
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING


async def test_a_model_whose_only_holder_is_drained_is_refused_for_that_reason(cluster: Cluster) -> None:
    cluster.nodes["a"].draining = cluster.nodes["a"].empty = True
    cluster.changed()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING, (
        "the node may be about to restart"
    )
    cluster.now += DRAINED
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
    assert "host-a, is draining" in answer.message and "undrain" in answer.message
    cluster.nodes["a"].draining = cluster.nodes["a"].empty = False
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_model_waits_for_a_reservation_of_a_former_leader_to_expire() -> None:
    cluster = Cluster(SETTINGS)
    owner = cluster.add("a", 1500 * MIB, model()).ledger
    assert owner.reserve(Reserve(cluster.term, "former", "b", {"CPU": 1000 * MIB}), cluster.now)[0].ok
    waits = await cluster.planner.ensure(ENSURE)
    assert waits.verdict is Verdict.PLANNING
    assert "waits for memory that another deployment is releasing" in waits.message
    cluster.now += 15.0
    owner.expire(cluster.now)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT


async def test_a_model_waits_for_memory_that_an_evicted_one_still_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apply, "FREED_WITHIN", 0.01)
    cluster = Cluster(SETTINGS)
    cluster.shapes["d2"] = cluster.shapes["d1"]
    node = cluster.add("a", 1500 * MIB, model(), model("other:latest", "d2"))
    deployment = await load(cluster)

    async def slow_to_die(method: str, request: object) -> object | None:
        if not isinstance(request, Unload):
            return None
        del node.endpoints[deployment]
        node.ledger.end_deployment(deployment, "unloaded")
        return Done(True)

    node.hook = slow_to_die
    waits = await cluster.planner.ensure(Ensure("other"))
    assert waits.verdict is Verdict.PLANNING, waits
    node.ledger.ended(deployment)
    cluster.now += 4.0
    assert (await cluster.planner.ensure(Ensure("other"))).verdict is Verdict.WAIT
