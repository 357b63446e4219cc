"""The leader among owners with real ledgers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from sollold.agent.commands import Deploy, Done, Release, Reserve, Reserved, Unload
from sollold.cluster.record import Backend, Endpoint, State
from sollold.cluster.term import Term
from sollold.config import PlacementSettings, Settings
from sollold.leader import leader
from sollold.leader.absence import BACK_WITHIN, GONE_WITHIN
from sollold.leader.ensure import Drop, Ensure, Ensured, Verdict
from sollold.leader.leader import Leader
from sollold.leader.memory import GOOD_SERVICE
from sollold.models.model import Model
from sollold.models.shape import Shape
from tests.leader.cluster import Cluster, model, refuse
from tests.placement.fleets import GIB, MIB, shape

SETTINGS = Settings(placement=PlacementSettings(context=2048, slots=1))
ASK = Ensure("demo")


@pytest.fixture
async def town() -> AsyncIterator[Cluster]:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB, model())
    cluster.add("b", 450 * MIB)
    cluster.add("c", 450 * MIB)
    await cluster.planner.start()
    yield cluster
    await cluster.planner.close()


async def placed(town: Cluster, ask: Ensure = ASK, **changes: Any) -> str:
    answer = await town.planner.ensure(ask)
    assert answer.verdict is Verdict.WAIT, answer
    town.ready(answer.deployment, **changes)
    return answer.deployment


def gone_for_good(town: Cluster, node: str) -> None:
    """It went so long ago that nobody waits for it."""
    del town.nodes[node]
    town.changed()
    town.now += BACK_WITHIN
    town.changed()


def break_off(town: Cluster, deployment: str, **changes: Any) -> None:
    """A deployment fails and its memory is given back."""
    town.ready(deployment, state=State.FAILED, reason="a worker is gone", **changes)
    for node in town.nodes.values():
        node.endpoints.pop(deployment, None)
        node.ledger.end(deployment, "failed")
        node.ledger.ended(deployment)
    town.changed()


async def test_places_reserves_in_order_and_deploys(town: Cluster) -> None:
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.WAIT
    assert answer.node == "a"
    assert answer.reasons
    reserved = town.asked("reserve")
    assert [node for node, _ in reserved] == ["a", "b", "c"]
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy)
    assert request.term == town.term
    assert request.keep_alive == 300.0
    plan = request.plan
    assert {node: r.bytes for node, r in reserved if isinstance(r, Reserve)} == plan.bytes_by_owner()
    assert town.granted() == sum(sum(d.values()) for d in plan.bytes_by_owner().values())


async def test_many_at_once_load_it_once(town: Cluster) -> None:
    answers = await asyncio.gather(*(town.planner.ensure(ASK) for _ in range(20)))
    assert {answer.verdict for answer in answers} == {Verdict.WAIT}
    assert len({answer.deployment for answer in answers}) == 1
    assert len(town.asked("deploy")) == 1
    again = await town.planner.ensure(ASK)
    assert (again.verdict, again.deployment) == (Verdict.WAIT, answers[0].deployment)


async def test_a_head_whose_record_is_late_is_waited_for(town: Cluster) -> None:
    for node in town.nodes.values():
        node.record()
        node.hidden = True
    first = await town.planner.ensure(ASK)
    second = await town.planner.ensure(ASK)
    assert second.deployment == first.deployment
    assert len(town.asked("deploy")) == 1
    # No byte is planned for twice either, though the records still show it free.
    town.nodes["a"].models.append(model("other:latest", "d2"))
    town.shapes["d2"] = shape()
    other = await town.planner.ensure(Ensure("other"))
    assert other.verdict is Verdict.REFUSED
    assert other.fault == "too_big"


async def test_what_is_ready_is_used(town: Cluster) -> None:
    deployment = await placed(town)
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment, answer.node) == (Verdict.USE, deployment, "a")


async def test_a_new_leader_adopts_what_runs(town: Cluster) -> None:
    deployment = await placed(town)
    other = Leader(SETTINGS, town, town, town, clock=lambda: town.now)
    answer = await other.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, deployment)


async def test_unknown_and_ambiguous_names(town: Cluster) -> None:
    answer = await town.planner.ensure(Ensure("nothing"))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "not_found")
    answer = await town.planner.ensure(Ensure("gone:latest", digest="d9"))
    assert answer.fault == "unavailable"
    assert "left the cluster" in answer.message
    town.nodes["b"].models += [model("twin:7b", "t1"), model("twin:8b", "t2")]
    answer = await town.planner.ensure(Ensure("twin"))
    assert answer.fault == "ambiguous"
    assert "twin:7b" in answer.message


async def test_too_big_is_refused_with_the_arithmetic(town: Cluster) -> None:
    gone_for_good(town, "c")
    answer = await town.planner.ensure(ASK)
    assert answer.fault == "too_big"
    for word in ("needs", "Missing", "host-a", "host-b", "another machine with 1 GiB"):
        assert word in answer.message, answer.message
    assert not town.asked("reserve")


async def test_a_refused_reservation_is_given_back_and_planned_anew(town: Cluster) -> None:
    town.add("d", 700 * MIB)
    town.nodes["d"].hook = refuse("only 10 MiB free", CPU=10 * MIB)
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy)
    assert "d" not in request.plan.bytes_by_owner()
    assert town.granted() == sum(sum(d.values()) for d in request.plan.bytes_by_owner().values())


async def test_an_owner_that_does_not_answer_is_left_out(town: Cluster) -> None:
    town.add("d", 700 * MIB)
    town.nodes["d"].unreachable = True
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy)
    assert "d" not in request.plan.bytes_by_owner()


async def test_all_is_released_when_the_head_does_not_take_it(town: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        return Done(False, "there is no llama.cpp") if method == "deploy" else None

    town.nodes["a"].hook = hook
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.REFUSED
    assert town.granted() == 0
    released = [request for _, request in town.asked("release")]
    assert all(isinstance(request, Release) for request in released)


async def test_one_limit_over_all_devices_is_learnt() -> None:
    from sollold.agent.ledger import Ledger
    from sollold.machine.device import Device, Kind

    town = Cluster(SETTINGS)
    gpu = Device("CUDA0", Kind.GPU, "gpu", 8 * GIB, 8 * GIB, 8 * GIB, 0, 0, 10 * MIB, 300e9, 1e13)
    cpu = Device("CPU", Kind.CPU, "cpu", 8 * GIB, 8 * GIB, 8 * GIB, 0, 0, 10 * MIB, 20e9, 1e11)
    node = town.add("a", 0, model(), devices=(cpu, gpu))
    node.ledger = Ledger(ready=True, node_limit=1000 * MIB)
    node.ledger.measured((cpu, gpu))
    town.shapes["d1"] = shape(16, 55 * MIB)
    answer = await town.planner.ensure(ASK)
    assert answer.verdict in (Verdict.WAIT, Verdict.REFUSED)
    assert town.granted() <= 1000 * MIB
    if answer.verdict is Verdict.REFUSED:
        assert answer.fault == "too_big", answer


async def test_a_stale_leader_takes_its_reservations_back(town: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        if method == "reserve":
            town.term = Term(2, "b")
        return None

    town.nodes["b"].hook = hook
    answer = await town.planner.ensure(ASK, timeout=1.0)
    # The new leader is asked instead; node b does not play one here.
    assert answer.verdict is Verdict.ELSEWHERE or answer.leader == "b"
    assert town.granted() == 0
    assert not town.asked("deploy")


async def test_a_term_that_owners_know_to_be_old_places_nothing(town: Cluster) -> None:
    for node in town.nodes.values():
        node.ledger.see(Term(9, "z"))
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.REFUSED
    assert town.granted() == 0
    assert not town.asked("deploy")


async def test_a_leader_that_dies_between_reserve_and_commit_leaves_nothing(town: Cluster) -> None:
    stuck = asyncio.Event()

    async def hook(method: str, request: object) -> object | None:
        if method == "deploy":
            stuck.set()
            await asyncio.Event().wait()
        return None

    town.nodes["a"].hook = hook
    asking = asyncio.create_task(town.planner.ensure(ASK))
    await stuck.wait()
    await town.planner.close()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert town.granted() > 0
    town.now += 60.0
    for node in town.nodes.values():
        node.ledger.expire(town.now)
    assert town.granted() == 0
    # The next leader goes on from there.
    town.nodes["a"].hook = None
    town.term = Term(2, "a")
    other = Leader(SETTINGS, town, town, town, clock=lambda: town.now)
    answer = await other.ensure(ASK)
    assert answer.verdict is Verdict.WAIT
    await other.close()


async def test_who_leads_is_told_and_asked(town: Cluster) -> None:
    town.term = Term(3, "b")

    async def hook(method: str, request: object) -> object | None:
        return Ensured(Verdict.USE, "x", "b") if method == "ensure" else None

    town.nodes["b"].hook = hook
    assert (await town.planner.ensure(ASK)).deployment == "x"
    town.term = Term()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.ELSEWHERE


async def test_an_idle_deployment_makes_room_and_a_busy_one_never(town: Cluster) -> None:
    town.nodes["a"].models.append(model("other:latest", "d2"))
    town.shapes["d2"] = shape()
    first = await placed(town, active=1, idle=0.0)
    refused = await town.planner.ensure(Ensure("other"))
    assert refused.fault == "too_big"
    assert "demo:latest giving back" in refused.message
    town.ready(first, active=0, waiting=0, idle=5.0)
    answer = await town.planner.ensure(Ensure("other"))
    assert answer.verdict is Verdict.WAIT
    assert [request.deployment for _, request in town.asked("unload") if isinstance(request, Unload)] == [
        first
    ]
    assert any("makes room" in reason for reason in answer.reasons)


async def test_pinned_and_waiting_ones_stay(town: Cluster) -> None:
    town.nodes["a"].models.append(model("other:latest", "d2"))
    town.shapes["d2"] = shape()
    first = await placed(town, pinned=True, idle=500.0)
    assert (await town.planner.ensure(Ensure("other"))).fault == "too_big"
    town.ready(first, pinned=False, waiting=1)
    assert (await town.planner.ensure(Ensure("other"))).fault == "too_big"
    assert not town.asked("unload")


async def test_one_that_was_just_used_refuses_and_is_kept(town: Cluster) -> None:
    town.nodes["a"].models.append(model("other:latest", "d2"))
    town.shapes["d2"] = shape()
    await placed(town, idle=500.0)

    async def hook(method: str, request: object) -> object | None:
        return Done(False, "a request came") if method == "unload" else None

    town.nodes["a"].hook = hook
    assert (await town.planner.ensure(Ensure("other"))).fault == "too_big"
    assert len(town.asked("deploy")) == 1


async def test_the_longest_idle_goes_and_no_more_than_must() -> None:
    town = Cluster(SETTINGS)
    names = ["one", "two", "three", "four"]
    town.add("a", 3200 * MIB, *(model(f"{name}:latest", name) for name in names))
    for name in names:
        town.shapes[name] = shape()
    await town.planner.start()
    held = {}
    for age, name in enumerate(names[:3]):
        held[name] = await placed(town, Ensure(name), idle=1000.0 - 300 * age)
    answer = await town.planner.ensure(Ensure("four"))
    assert answer.verdict is Verdict.WAIT
    assert [r.deployment for _, r in town.asked("unload") if isinstance(r, Unload)] == [held["one"]]
    await town.planner.close()


async def test_a_larger_context_reloads_only_what_is_idle(town: Cluster) -> None:
    town.add("d", 2 * GIB)
    first = await placed(town, active=1)
    answer = await town.planner.ensure(replace(ASK, context=8192))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    town.ready(first, active=0, idle=3.0)
    answer = await town.planner.ensure(replace(ASK, context=8192))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    town.ready(answer.deployment)
    # And back: who needs less uses what is there.
    smaller = await town.planner.ensure(replace(ASK, context=1024))
    assert (smaller.verdict, smaller.deployment) == (Verdict.USE, answer.deployment)


async def test_more_than_the_training_is_no_reason_to_reload(town: Cluster) -> None:
    town.add("d", 2 * GIB)
    answer = await town.planner.ensure(replace(ASK, context=100_000))
    assert answer.verdict is Verdict.WAIT
    town.ready(answer.deployment, idle=10.0)
    again = await town.planner.ensure(replace(ASK, context=100_000))
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_a_context_that_fits_nowhere_keeps_what_runs(town: Cluster) -> None:
    first = await placed(town, idle=3.0)
    answer = await town.planner.ensure(replace(ASK, context=32768))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    assert not town.asked("unload")


async def test_a_model_that_fails_again_and_again_is_left_alone_for_a_while(town: Cluster) -> None:
    for _ in range(2):
        answer = await town.planner.ensure(ASK)
        assert answer.verdict is Verdict.WAIT
        town.ready(answer.deployment, state=State.FAILED, reason="bad tensor.")
        for node in town.nodes.values():
            node.ledger.end(answer.deployment, "failed")
            node.ledger.ended(answer.deployment)
        town.changed()
    refused = await town.planner.ensure(ASK)
    assert refused.fault == "unavailable"
    assert "bad tensor" in refused.message
    assert refused.retry_after > 0
    town.now += 10.0
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_deployment_that_broke_after_answering_is_placed_again_at_once(town: Cluster) -> None:
    for _ in range(5):
        deployment = await placed(town)
        town.ready(deployment, state=State.FAILED, reason="a worker died")
        for node in town.nodes.values():
            node.ledger.end(deployment, "failed")
            node.ledger.ended(deployment)
        town.changed()
    assert len(town.asked("deploy")) == 5


async def test_a_new_leader_takes_no_fault_of_before_for_a_load_that_failed(town: Cluster) -> None:
    for _ in range(3):
        deployment = await placed(town)
        town.ready(deployment, state=State.FAILED, reason="a worker died", answered=True)
        for node in town.nodes.values():
            node.ledger.end(deployment, "failed")
            node.ledger.ended(deployment)
        town.changed()
    other = Leader(SETTINGS, town.seen_by("a"), town, town, clock=lambda: town.now)
    town.term = Term(2, "a")
    assert (await other.ensure(ASK)).verdict is Verdict.WAIT
    await other.close()


async def test_draining_excluded_and_other_builds_take_no_part(town: Cluster) -> None:
    town.add("d", 900 * MIB)
    town.add("e", 900 * MIB).build = "b2"
    town.add("f", 900 * MIB).build = ""
    town.nodes["b"].draining = True
    answer = await town.planner.ensure(replace(ASK, exclude=("c",)))
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy)
    assert set(request.plan.bytes_by_owner()) == {"a", "d"}


async def test_no_llama_cpp_yet() -> None:
    town = Cluster(SETTINGS)
    town.add("a", 450 * MIB, model()).build = ""
    answer = await town.planner.ensure(ASK)
    assert answer.fault == "unavailable"
    assert "llama.cpp" in answer.message


async def test_ollama_first_where_it_fits() -> None:
    town = Cluster(SETTINGS)
    node = town.add("a", 2 * GIB, model())
    node.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False
    )
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, "ollama:demo:latest")
    assert (await town.planner.ensure(replace(ASK, ollama=False))).verdict is Verdict.WAIT


async def test_ollama_only_models_and_unusable_ones() -> None:
    town = Cluster(SETTINGS)
    node = town.add("a", 2 * GIB, model(only_ollama="stock llama.cpp can't read it"))
    answer = await town.planner.ensure(ASK)
    assert answer.fault == "unavailable"
    assert "can't read it" in answer.message
    node.models[:] = [model(unusable="the file is cut short; fetch it again")]
    answer = await town.planner.ensure(ASK)
    assert answer.fault == "bad_request"
    assert "cut short" in answer.message


async def test_an_embedder_has_a_server_of_its_own(town: Cluster) -> None:
    town.add("d", 4 * GIB)
    first = await placed(town)
    answer = await town.planner.ensure(replace(ASK, embedding=True))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    plan = [r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy)][-1]
    assert plan.run.embedding
    assert plan.run.batch == plan.run.ubatch


async def test_a_replica_only_in_free_memory(town: Cluster) -> None:
    first = await placed(town, active=1, waiting=9)
    answer = await town.planner.ensure(replace(ASK, more=True))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    town.add("d", 2 * GIB, model())
    answer = await town.planner.ensure(replace(ASK, more=True))
    assert answer.verdict is Verdict.WAIT
    assert answer.node == "d"


async def test_drop_ends_what_is_idle(town: Cluster) -> None:
    first = await placed(town, active=1)
    dropped = await town.planner.drop(Drop("demo"))
    assert dropped.refused == ((first, "there are requests in it"),)
    dropped = await town.planner.drop(Drop("demo", force=True))
    assert dropped.ended == (first,)
    assert town.granted() == 0
    # What was just ended is no longer counted on.
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_drop_ends_what_only_the_caller_sees_yet(town: Cluster) -> None:
    for node in town.nodes.values():
        node.record()
        node.hidden = True
    answer = await town.planner.ensure(ASK)
    assert (await town.planner.drop(Drop("demo"))).ended == ()
    seen = ((answer.node, answer.deployment),)
    assert (await town.planner.drop(Drop("demo", seen=seen))).ended == (answer.deployment,)


async def test_the_preview_places_nothing(town: Cluster) -> None:
    preview = await town.planner.preview(ASK)
    assert preview.ok
    assert preview.plan is not None
    assert preview.weights > 800 * MIB
    assert preview.context == 2048
    assert {free.node for free in preview.free} == {"a", "b", "c"}
    assert all(0 <= free.after < free.before for free in preview.free)
    assert preview.plan.tokens_per_second > 0
    assert not town.calls_made
    deployment = await placed(town)
    preview = await town.planner.preview(ASK)
    assert (preview.verdict, preview.endpoint) == (Verdict.USE, deployment)
    assert preview.plan is not None
    gone_for_good(town, "c")
    town.nodes["a"].endpoints.clear()
    preview = await town.planner.preview(ASK)
    assert not preview.ok
    assert preview.missing is not None
    assert preview.missing.missing > 0
    assert (await town.planner.preview(Ensure("nothing"))).verdict is Verdict.REFUSED


async def test_a_threshold_spreads_what_would_fit() -> None:
    town = Cluster(replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3)))
    town.add("a", 2 * GIB, model())
    town.add("b", 2 * GIB)
    await town.planner.ensure(ASK)
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy)
    assert set(request.plan.bytes_by_owner()) == {"a", "b"}
    del town.nodes["b"]
    town.nodes["a"].endpoints.clear()
    assert isinstance(await town.planner.preview(ASK), object)


async def test_refusals_of_another_kind_end_after_a_few_attempts(town: Cluster) -> None:
    attempts = 0

    async def hook(method: str, request: object) -> object | None:
        nonlocal attempts
        if method == "reserve":
            attempts += 1
            return Reserved(False, "the node is draining and takes no new work", {"CPU": 450 * MIB})
        return None

    town.nodes["b"].hook = hook
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.REFUSED
    assert "draining" in answer.message
    assert attempts <= 6


async def test_memory_that_is_being_given_back_is_waited_for(town: Cluster) -> None:
    deployment = await placed(town)
    # The head is gone with its endpoint, and the owners have not heard so yet.
    town.ready(deployment, state=State.FAILED, reason="a worker died")
    town.now += 30.0
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING
    assert "giving back" in answer.message
    assert (await town.planner.preview(ASK)).plan is not None
    for node in town.nodes.values():
        node.ledger.end(deployment, "silent")
        node.ledger.ended(deployment)
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_worse_plan_waits_a_moment_for_memory_that_is_about_to_be_free() -> None:
    town = Cluster(Settings(placement=PlacementSettings(context=4096, slots=8)))
    town.add("a", 1400 * MIB, model())
    town.add("b", 1100 * MIB, model())
    await town.planner.start()
    deployment = await placed(town)
    town.ready(deployment, state=State.FAILED, reason="a worker died")
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "giving back" in answer.message
    # Its owner does not give it back: then it goes without.
    town.now += 2.1
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT
    plans = [r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy)]
    assert [(plan.head, plan.run.slots) for plan in plans] == [("a", 4), ("b", 2)]
    await town.planner.close()


async def test_a_header_that_can_not_be_read_just_now_is_asked_for_again(
    town: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, asked = town.shape, 0

    async def shape(node: str, model: Model) -> Shape:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise LookupError("the node is busy with a fault")
        return await known(node, model)

    monkeypatch.setattr(town, "shape", shape)
    monkeypatch.setattr(leader, "SHAPE_PAUSES", (0.0, 0.0, 0.0))
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT
    assert asked >= 3


async def test_new_requests_wait_for_what_a_draining_node_gives_back(town: Cluster) -> None:
    town.nodes["b"].models.append(model())
    town.nodes["c"].models.append(model())
    town.add("d", 450 * MIB)
    deployment = await placed(town, active=1, idle=0.0)
    head = next(r.plan.head for _, r in town.asked("deploy") if isinstance(r, Deploy))
    town.nodes[head].draining = True
    town.changed()
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "giving back" in answer.message
    for node in town.nodes.values():
        node.endpoints.pop(deployment, None)
        node.ledger.end(deployment, "the daemon is stopping")
        node.ledger.ended(deployment)
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_what_a_dead_head_left_behind_is_released(town: Cluster) -> None:
    town.nodes["b"].models.append(model())
    town.nodes["c"].models.append(model())
    town.add("d", 450 * MIB)
    deployment = await placed(town)
    plan = next(r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy))
    left = set(plan.bytes_by_owner()) - {plan.head}
    assert left
    del town.nodes[plan.head]
    town.term = Term(2, "c" if plan.head == "a" else "a")
    other = Leader(SETTINGS, town.seen_by(town.term.leader), town, town, clock=lambda: town.now)
    answers = [await other.ensure(ASK) for _ in range(2)]
    assert answers[-1].verdict is Verdict.WAIT, answers
    assert all(not node.ledger.holds(deployment) for node in town.nodes.values())
    await other.close()


async def test_a_head_that_dies_before_its_record_shows_anything_is_not_waited_for(town: Cluster) -> None:
    town.nodes["b"].models.append(model())
    town.add("d", 450 * MIB)
    first = await town.planner.ensure(replace(ASK, exclude=("a",)))
    assert (first.verdict, first.node) == (Verdict.WAIT, "b")
    del town.nodes["b"]
    town.add("e", 450 * MIB)
    second = await town.planner.ensure(ASK)
    assert second.verdict in (Verdict.WAIT, Verdict.PLANNING)
    assert second.deployment != first.deployment


async def test_what_closes_takes_no_new_requests_and_gives_its_memory_back_soon(town: Cluster) -> None:
    deployment = await placed(town, active=1, idle=0.0, closing=True)
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "giving back" in answer.message
    town.nodes["a"].unload(Unload(town.term, deployment, force=True))
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_model_that_needs_every_node_waits_for_one_that_has_just_gone(town: Cluster) -> None:
    deployment = await placed(town)
    town.now += 1.0
    gone = town.nodes.pop("b")
    gone.ledger.end(deployment, "the daemon is gone")
    gone.ledger.ended(deployment)
    break_off(town, deployment, answered=True, culprit="b")
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "waits for host-b" in answer.message
    assert (await town.planner.preview(ASK)).verdict is Verdict.PLANNING
    # It is back, and its llama.cpp is being looked for still.
    gone.build = ""
    town.nodes["b"] = gone
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    gone.build = "b1"
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_node_that_stays_away_is_not_waited_for(town: Cluster) -> None:
    del town.nodes["b"]
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    town.now += BACK_WITHIN
    town.changed()
    refused = await town.planner.ensure(ASK)
    assert (refused.verdict, refused.fault) == (Verdict.REFUSED, "too_big")
    assert "MiB" in refused.message


async def test_a_node_that_drains_is_waited_for_until_it_should_have_been_restarted(town: Cluster) -> None:
    town.nodes["b"].draining = True
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    town.now += SETTINGS.serving.drain_limit + GONE_WITHIN - 1
    gone = town.nodes.pop("b")
    town.changed()
    town.now += BACK_WITHIN - 1
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    gone.draining = False
    town.nodes["b"] = gone
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_a_node_that_goes_on_draining_is_not_waited_for(town: Cluster) -> None:
    town.nodes["b"].draining = True
    town.changed()
    town.now += SETTINGS.serving.drain_limit + GONE_WITHIN
    refused = await town.planner.ensure(ASK)
    assert (refused.verdict, refused.fault) == (Verdict.REFUSED, "too_big")


async def test_an_owner_that_can_not_be_asked_just_now_is_waited_for(town: Cluster) -> None:
    town.nodes["b"].unreachable = True
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "host-b" in answer.message
    town.nodes["b"].unreachable = False
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


async def test_the_node_whose_part_of_loads_fails_is_left_out_and_not_the_head(town: Cluster) -> None:
    town.add("d", 450 * MIB)
    for _ in range(3):
        answer = await town.planner.ensure(ASK)
        assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
        break_off(town, answer.deployment, culprit="b")
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
    plan = [r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy)][-1]
    assert set(plan.bytes_by_owner()) == {"a", "c", "d"}


async def test_a_node_on_which_answers_break_again_and_again_is_avoided_where_others_can_do_it(
    town: Cluster,
) -> None:
    # It is needed: better that one than none.
    for _ in range(4):
        break_off(town, await placed(town), culprit="b")
    town.add("d", 450 * MIB)
    await placed(town)
    plan = [r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy)][-1]
    assert set(plan.bytes_by_owner()) == {"a", "c", "d"}


async def test_minutes_of_good_service_make_a_node_good_again(town: Cluster) -> None:
    for _ in range(3):
        break_off(town, await placed(town), culprit="b")
    deployment = await placed(town)
    town.now += GOOD_SERVICE
    town.changed()
    break_off(town, deployment, culprit="b")
    town.add("d", 450 * MIB)
    await placed(town)
    plan = [r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy)][-1]
    assert "b" in plan.bytes_by_owner()


async def test_a_head_that_drains_and_is_needed_again_is_waited_for(town: Cluster) -> None:
    town.nodes["b"].models.append(model())
    deployment = await placed(town)
    head = next(node for node in town.nodes.values() if deployment in node.endpoints)
    # The order is so new that the leader remembers it still.
    town.now += 1.0
    head.draining = True
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
