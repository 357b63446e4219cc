"""The leader among owners with real ledgers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from sollold.agent.commands import Commit, Deploy, Done, Release, Reserve, Reserved, Unload
from sollold.cluster.record import Backend, Endpoint, InOllama, State
from sollold.cluster.term import Term
from sollold.config import ModelSettings, PlacementSettings, Settings
from sollold.leader import leader
from sollold.leader.absence import BACK_WITHIN, GONE_WITHIN
from sollold.leader.ensure import Drop, Ensure, Ensured, Verdict
from sollold.leader.leader import Leader
from sollold.leader.memory import GOOD_SERVICE, LAST_RESORT
from sollold.models.model import Model
from sollold.models.shape import Shape
from sollold.placement.shortfall import Shortfall, explain
from tests.leader.cluster import Cluster, cpu_device, model, refuse
from tests.placement.fleets import GIB, MIB, shape

SETTINGS = Settings(
    placement=PlacementSettings(context=2048, slots=1),
    # Files stay where they are.
    models=ModelSettings(fetch_seconds=0),
)
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


async def test_settings_that_are_read_again_hold_for_the_next_placement(town: Cluster) -> None:
    town.planner.use(replace(SETTINGS, placement=replace(SETTINGS.placement, keep_alive=7.0)))
    await town.planner.ensure(ASK)
    ((_, request),) = town.asked("deploy")
    assert isinstance(request, Deploy) and request.keep_alive == 7.0


async def test_many_at_once_load_it_once(town: Cluster) -> None:
    answers = await asyncio.gather(*(town.planner.ensure(ASK) for _ in range(20)))
    assert {answer.verdict for answer in answers} == {Verdict.WAIT}
    assert len({answer.deployment for answer in answers}) == 1
    assert len(town.asked("deploy")) == 1
    again = await town.planner.ensure(ASK)
    assert (again.verdict, again.deployment) == (Verdict.WAIT, answers[0].deployment)


async def test_a_model_that_the_caller_knows_may_be_news_to_the_leader(town: Cluster) -> None:
    town.shapes["d9"] = town.shapes[ASK.digest or model().digest]
    asking = asyncio.create_task(town.planner.ensure(Ensure("new:latest", digest="d9")))
    done, _ = await asyncio.wait([asking], timeout=0.3)
    assert not done
    town.nodes["a"].models.append(model("new:latest", "d9"))
    assert (await asking).verdict is Verdict.WAIT


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


async def test_layers_that_can_not_be_counted_out_so_are_the_callers_fault_and_not_want_of_memory(
    town: Cluster,
) -> None:
    answer = await town.planner.ensure(Ensure("demo", fixed=(("a", 3), ("b", 4))))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "bad_request")
    assert "sum to 7" in answer.message and "17" in answer.message
    answer = await town.planner.ensure(Ensure("demo", fixed=(("a", 9), ("z", 8))))
    assert answer.fault == "bad_request"
    assert "no node z" in answer.message and "host-b" in answer.message
    answer = await town.planner.ensure(Ensure("demo", fixed=(("a", 15), ("b", 2))))
    assert answer.fault == "too_big"
    assert "What would help: leaving to the planner which node gets how many layers" in answer.message
    assert (await town.planner.ensure(Ensure("demo", fixed=(("a", 4), ("b", 6), ("c", 7))))).deployment


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


async def test_of_a_shared_memory_no_more_is_planned_than_its_ledger_has() -> None:
    from sollold.machine.device import Device, Kind

    town = Cluster(SETTINGS)
    both = (
        Device("CPU", Kind.CPU, "cpu", 8 * GIB, GIB, 8 * GIB, 0, 0, 10 * MIB, 20e9, 1e11, pool="ram"),
        Device("Vulkan0", Kind.GPU, "gpu", 8 * GIB, GIB, 8 * GIB, 0, 0, 10 * MIB, 60e9, 1e12, pool="ram"),
    )
    town.add("a", 0, model(), devices=both)
    town.shapes["d1"] = shape(16, 80 * MIB)
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert "room for 1004 MiB" in answer.message, "its free memory less the spare room"
    assert not town.asked("reserve"), "what is there once was taken to be there twice"
    town.shapes["d1"] = shape(16, 40 * MIB)
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT
    assert len(town.asked("reserve")) == 1


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


async def test_a_head_that_dies_while_it_unloads_holds_up_no_placement(town: Cluster) -> None:
    town.nodes["c"].models.append(model("other:latest", "d2"))
    town.shapes["d2"] = shape(4, 20 * MIB)
    other = await placed(town, Ensure("other"), idle=600.0)
    asked = asyncio.Event()

    async def stopped(method: str, request: object) -> object | None:
        if method == "unload":
            asked.set()
            await asyncio.Event().wait()
        return None

    town.nodes["c"].hook = stopped
    town.add("d", 450 * MIB)
    town.nodes["a"].models.append(model("large:latest", "d3"))
    town.shapes["d3"] = shape(16, 80 * MIB)
    waiting = asyncio.create_task(town.planner.ensure(Ensure("large")))
    await asked.wait()
    del town.nodes["c"]
    town.add("e", 900 * MIB)
    town.changed()
    answer = await asyncio.wait_for(waiting, 5)
    assert answer.verdict in (Verdict.WAIT, Verdict.PLANNING), answer
    assert [node for node, _ in town.asked("unload")] == ["c"], other


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


async def test_of_forty_idle_ones_only_what_must_goes() -> None:
    town = Cluster(SETTINGS)
    names = [f"m{number:02}" for number in range(40)]
    town.add("a", 5000 * MIB, *(model(f"{name}:latest", name) for name in [*names, "big"]))
    for name in names:
        town.shapes[name] = shape(4, 10 * MIB, 10 * MIB, n_embd=256, n_vocab=8000)
    town.shapes["big"] = shape(16, 40 * MIB, 20 * MIB)
    await town.planner.start()
    held = [
        await placed(town, Ensure(name), idle=6000.0 - 100 * age, bytes=0) for age, name in enumerate(names)
    ]
    free = town.nodes["a"].ledger.devices()[0].available
    answer = await town.planner.ensure(Ensure("big"))
    assert answer.verdict is Verdict.WAIT
    ended = [request.deployment for _, request in town.asked("unload") if isinstance(request, Unload)]
    (big,) = [request for _, request in town.asked("deploy") if isinstance(request, Deploy)][40:]
    needed = sum(sum(devices.values()) for devices in big.plan.bytes_by_owner().values())
    each = sum(grant.bytes for grant in town.nodes["a"].ledger.grants() if grant.deployment == held[-1])
    assert 1 <= len(ended) <= -(-(needed - free) // each) + 1
    # Those idle the longest.
    assert set(ended) == set(held[: len(ended)])
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


async def test_a_context_that_grows_in_small_steps_reloads_seldom(town: Cluster) -> None:
    town.add("d", 3 * GIB)
    await placed(town, idle=3.0)
    for context in range(2100, 8000, 300):
        answer = await town.planner.ensure(replace(ASK, context=context))
        town.ready(answer.deployment, idle=3.0)
        (endpoint,) = [e for node in town.nodes.values() for e in node.endpoints.values()]
        assert endpoint.context >= context
    contexts = [r.plan.run.context for _, r in town.asked("deploy") if isinstance(r, Deploy)]
    assert contexts == [2048, 4096, 8192]


async def test_what_finds_no_room_for_more_is_given_what_was_named() -> None:
    town = Cluster(SETTINGS)
    town.add("a", 1250 * MIB, model())
    await town.planner.start()
    await placed(town, idle=3.0)
    contexts = []
    for context in range(2304, 32768, 256):
        answer = await town.planner.ensure(replace(ASK, context=context))
        if answer.verdict is Verdict.USE and "does not fit" in answer.reasons[0]:
            break
        town.ready(answer.deployment, idle=3.0)
        contexts.append(town.nodes["a"].endpoints[answer.deployment].context)
    # Powers of two as long as they fit, then exactly what is named.
    assert contexts[0] == 4096
    assert contexts[-1] == context - 256
    assert contexts[-1] & (contexts[-1] - 1)
    await town.planner.close()


async def test_what_is_named_otherwise_is_loaded_anew_when_idle(town: Cluster) -> None:
    first = await placed(town, active=1)
    for named, words in (
        (replace(ASK, slots=2), "2 requests at a time"),
        (replace(ASK, type_k="q8_0", type_v="q8_0"), "keys and values in q8_0"),
        (replace(ASK, policy="even"), "the policy even"),
        (replace(ASK, fixed=(("host-a", 5), ("host-b", 6), ("host-c", 6))), "host-b 6"),
    ):
        answer = await town.planner.ensure(named)
        assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
        assert words in answer.message
        assert "in use" in answer.message
    preview = await town.planner.preview(replace(ASK, slots=2))
    assert preview.verdict is Verdict.REFUSED
    assert preview.plan is not None
    town.ready(first, active=0, idle=3.0)
    answer = await town.planner.ensure(replace(ASK, type_k="q8_0", type_v="q8_0"))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    assert any("without keys and values in q8_0" in reason for reason in answer.reasons)
    # While it loads another wish is not taken for the same.
    assert (await town.planner.ensure(replace(ASK, policy="even"))).fault == "unavailable"
    town.ready(answer.deployment, idle=3.0)
    # Who names nothing, or what it has, uses what is there.
    for same in (ASK, replace(ASK, type_k="q8_0"), replace(ASK, slots=1), replace(ASK, policy="fastest")):
        again = await town.planner.ensure(same)
        assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_fewer_slots_than_named_are_no_reason_to_load_it_again_and_again(town: Cluster) -> None:
    many = replace(ASK, slots=64)
    answer = await town.planner.ensure(many)
    town.ready(answer.deployment, idle=3.0)
    assert town.nodes["a"].endpoints[answer.deployment].slots < 64
    again = await town.planner.ensure(many)
    assert (again.verdict, again.deployment) == (Verdict.USE, answer.deployment)


async def test_what_can_not_be_had_as_named_leaves_what_runs(town: Cluster) -> None:
    first = await placed(town, idle=3.0)
    answer = await town.planner.ensure(replace(ASK, fixed=(("host-a", 17),)))
    assert answer.verdict is Verdict.REFUSED
    assert not town.asked("unload")
    assert first in town.nodes["a"].endpoints


async def test_two_wishes_at_once_are_not_taken_for_one(town: Cluster) -> None:
    even, fast = await asyncio.gather(
        town.planner.ensure(replace(ASK, policy="even")), town.planner.ensure(replace(ASK, policy="fastest"))
    )
    assert even.verdict is Verdict.WAIT
    assert fast.verdict is Verdict.REFUSED
    assert "the policy fastest" in fast.message
    (request,) = [request for _, request in town.asked("deploy") if isinstance(request, Deploy)]
    assert request.plan.asked.policy == "even"


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


async def test_an_ollama_whose_files_its_node_can_not_read_is_used() -> None:
    town = Cluster(SETTINGS)
    node = town.add("a", 2 * GIB, model(manifest="a" * 64))
    other = town.add("b", 2 * GIB)
    other.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "a" * 64, Backend.OLLAMA, State.READY, loaded=True
    )
    ask = replace(ASK, digest="d1", in_ollama=InOllama(("demo:latest",), ("a" * 64,)))
    answer = await town.planner.ensure(ask)
    assert (answer.verdict, answer.node) == (Verdict.USE, "b")
    other.endpoints["ollama:demo:latest"] = replace(
        other.endpoints["ollama:demo:latest"], model="mario:latest"
    )
    assert (await town.planner.ensure(ask)).verdict is Verdict.WAIT
    assert node.endpoints


def offered(town: Cluster, node: str, **changes: Any) -> str:
    """The Ollama of a node has the model, and has not loaded it."""
    one = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False)
    town.nodes[node].endpoints[one.id] = replace(one, **changes)
    return one.id


async def test_a_model_that_is_to_be_sharded_is_so_though_an_ollama_could_hold_it() -> None:
    settings = replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3))

    def two() -> Cluster:
        town = Cluster(settings)
        town.add("a", 2 * GIB, model())
        town.add("b", 2 * GIB)
        return town

    town = two()
    offered(town, "a")
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT
    town = two()
    offered(town, "a", loaded=True)
    assert (await town.planner.ensure(ASK)).verdict is Verdict.USE, "what is loaded there already answers"
    town.nodes["a"].models[:] = [model(only_ollama="stock llama.cpp can't read it")]
    offered(town, "a")
    assert (await town.planner.ensure(ASK)).verdict is Verdict.USE, "nothing else can run it"


async def test_an_ollama_without_room_for_the_context_is_passed_over(town: Cluster) -> None:
    town.nodes["a"].ledger.measured((replace(cpu_device(900 * MIB), available=0),))
    named = offered(town, "a")
    answer = await town.planner.ensure(replace(ASK, context=2048))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)
    long = await town.planner.ensure(replace(ASK, context=32768))
    assert long.verdict is not Verdict.USE or long.deployment != named


async def test_an_ollama_is_the_last_resort_of_what_can_not_be_placed() -> None:
    town = Cluster(SETTINGS)
    town.add("a", 300 * MIB, model())
    refused = await town.planner.ensure(ASK)
    assert refused.fault == "too_big"
    named = offered(town, "a")
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)
    assert "nothing else can run it" in answer.reasons[0]
    again = await town.planner.ensure(replace(ASK, ollama=False))
    assert again.fault == "too_big", "where the Ollama has failed too the arithmetic is told"


async def test_what_fails_again_and_again_is_given_to_an_ollama_that_has_it(town: Cluster) -> None:
    for _ in range(3):
        answer = await town.planner.ensure(ASK)
        if answer.verdict is Verdict.WAIT:
            town.ready(answer.deployment, state=State.FAILED, reason="unknown tensor type")
            for node in town.nodes.values():
                node.ledger.end(answer.deployment, "failed")
                node.ledger.ended(answer.deployment)
    assert "has failed" in (await town.planner.ensure(ASK)).message
    named = offered(town, "a")
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)


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


async def test_an_ollamas_long_line_gets_a_llama_server_beside_it_and_faults_do_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "REPLICA_EVERY", 0.01)
    town = Cluster(SETTINGS)
    town.add("a", 2 * GIB, model())
    town.add("b", 2 * GIB, model("other:latest", "d2"))
    town.shapes["d2"] = shape()
    one = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, waiting=9)
    other = replace(one, id="ollama:other:latest", model="other:latest", digest="d2")
    town.nodes["a"].endpoints[one.id] = one
    town.nodes["b"].endpoints[other.id] = other
    usual = town.shape

    async def broken(node: str, asked: Model) -> Shape:
        if asked.digest == "d1":
            raise RuntimeError("a fault of our own")
        return await usual(node, asked)

    town.shape = broken  # type: ignore[method-assign]
    await town.planner.start()
    try:
        await asyncio.sleep(0.05)
        town.now += 11.0
        for _ in range(300):
            if town.asked("deploy"):
                break
            await asyncio.sleep(0.01)
        plans = [request.plan for _, request in town.asked("deploy") if isinstance(request, Deploy)]
        assert [(plan.model, plan.head) for plan in plans] == [("other:latest", "b")]
        town.shape = usual  # type: ignore[method-assign]
        town.now += 61.0
        for _ in range(300):
            if len(town.asked("deploy")) > 1:
                break
            await asyncio.sleep(0.01)
        assert {request.plan.model for _, request in town.asked("deploy") if isinstance(request, Deploy)} == {
            "demo:latest",
            "other:latest",
        }
    finally:
        await town.planner.close()


async def test_what_one_nodes_llama_cpp_can_not_read_none_of_that_build_is_asked_to(town: Cluster) -> None:
    learnt = "llama.cpp b1 can't read it: unknown tensor type"
    town.nodes["a"].models[:] = [model(only_ollama=learnt)]
    town.add("d", 2 * GIB, model())
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.REFUSED and learnt in answer.message
    named = offered(town, "d")
    assert (await town.planner.ensure(ASK)).deployment == named
    town.nodes["d"].endpoints.clear()
    town.nodes["d"].build = "b2"
    assert (await town.planner.ensure(ASK)).node == "d", "another build may read it"


async def test_an_api_that_knows_no_files_says_nothing_of_the_content(town: Cluster) -> None:
    town.nodes["a"].models[:] = [model(files=(), only_ollama="its files can't be read there")]
    town.add("d", 2 * GIB, model())
    assert (await town.planner.ensure(ASK)).node == "d"


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
    empty = preview.free
    assert preview.plan.tokens_per_second > 0
    assert not town.calls_made
    deployment = await placed(town)
    preview = await town.planner.preview(ASK)
    assert (preview.verdict, preview.endpoint) == (Verdict.USE, deployment)
    assert preview.plan is not None
    assert preview.free == empty, "what would be free is reckoned without the deployment that would go"
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
    view = town.seen_by("c" if plan.head == "a" else "a")
    other = Leader(SETTINGS, view, town, town, clock=lambda: town.now)
    await other.start()
    del town.nodes[plan.head]
    view.term = town.term = Term(2, view.here)
    answers = [await other.ensure(ASK) for _ in range(2)]
    assert answers[-1].verdict is Verdict.WAIT, answers
    assert all(not node.ledger.holds(deployment) for node in town.nodes.values())
    await other.close()


async def test_what_belongs_to_a_head_whose_record_has_not_come_yet_is_left_alone(town: Cluster) -> None:
    owner = town.nodes["b"].ledger
    assert owner.reserve(Reserve(town.term, "other-1", "x", {"CPU": 400 * MIB}), town.now)[0].ok
    assert owner.commit(Commit("other-1", "x", ("CPU",), "b1"), town.now)[0].ok
    answer = await town.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING, "its owner ends it when its head stays silent"
    assert not town.asked("release")
    assert owner.live("other-1")


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


async def test_what_is_missing_is_reckoned_for_those_alone_who_are_told(
    town: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def counted(*args: Any) -> Shortfall:
        shortfall = explain(*args)
        told.append(shortfall.message)
        return shortfall

    monkeypatch.setattr("sollold.leader.decide.explain", counted)
    del town.nodes["c"]
    town.changed()
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    assert not told, "who waits asks again and again"
    town.now += BACK_WITHIN
    town.changed()
    answer = await town.planner.ensure(ASK)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert told == [answer.message]


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


async def test_a_node_whose_loads_fail_again_and_again_is_tried_where_nothing_else_can_do_it(
    town: Cluster,
) -> None:
    for _ in range(6):
        answer = await town.planner.ensure(ASK)
        assert answer.verdict is Verdict.WAIT, answer
        break_off(town, answer.deployment, culprit="b")
        town.now += LAST_RESORT
    town.now -= 1
    assert (await town.planner.ensure(ASK)).verdict is Verdict.PLANNING
    town.now += 1
    assert (await town.planner.ensure(ASK)).verdict is Verdict.WAIT


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
