"""The leader with owners that have real ledgers: placement, reservations, terms, names, previews."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sollold.agent.ledger import Ledger
from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.engines.commands import Deploy, Done, Release, Reserve
from sollold.errors import Fault
from sollold.leader.leader import Leader
from sollold.leader.messages import Drop, Ensure, Verdict
from sollold.machine.device import Device, Kind
from tests.leader.cluster import (
    ENSURE,
    SETTINGS,
    Cluster,
    cpu_device,
    load,
    model,
    refuse,
    remove_for_good,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_a_placement_reserves_in_node_order_and_deploys(cluster: Cluster) -> None:
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    assert answer.node == "a"
    assert answer.reasons
    reserved = cluster.requests("reserve")
    assert [node for node, _ in reserved] == ["a", "b", "c"]
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy)
    assert request.term == cluster.term
    assert request.keep_alive == 300.0
    plan = request.plan
    assert {node: r.bytes for node, r in reserved if isinstance(r, Reserve)} == plan.bytes_by_owner()
    assert cluster.granted() == sum(sum(d.values()) for d in plan.bytes_by_owner().values())


async def test_reloaded_settings_apply_to_the_next_placement(cluster: Cluster) -> None:
    cluster.planner.use_settings(replace(SETTINGS, placement=replace(SETTINGS.placement, keep_alive=7.0)))
    await cluster.planner.ensure(ENSURE)
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy) and request.keep_alive == 7.0


async def test_concurrent_requests_load_a_model_once(cluster: Cluster) -> None:
    answers = await asyncio.gather(*(cluster.planner.ensure(ENSURE) for _ in range(20)))
    assert {answer.verdict for answer in answers} == {Verdict.WAIT}
    assert len({answer.deployment for answer in answers}) == 1
    assert len(cluster.requests("deploy")) == 1
    again = await cluster.planner.ensure(ENSURE)
    assert (again.verdict, again.deployment) == (Verdict.WAIT, answers[0].deployment)


async def test_the_leader_waits_for_a_model_that_only_the_caller_knows(cluster: Cluster) -> None:
    cluster.shapes["d9"] = cluster.shapes[ENSURE.digest or model().digest]
    asking = asyncio.create_task(cluster.planner.ensure(Ensure("new:latest", digest="d9")))
    done, _ = await asyncio.wait([asking], timeout=0.3)
    assert not done
    cluster.nodes["a"].models.append(model("new:latest", "d9"))
    assert (await asking).verdict is Verdict.WAIT


async def test_another_version_is_not_loaded_for_a_caller_of_the_one_it_replaced(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.leader.snapshot_maker._LOOKUP_SECONDS", 0.0)
    answer = await cluster.planner.ensure(Ensure("demo:latest", digest="d0"))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
    assert "demo:latest was replaced by another version" in answer.message
    assert not cluster.requests("deploy")
    assert (await cluster.planner.ensure(Ensure("demo:latest", digest="d1"))).verdict is Verdict.WAIT


async def test_the_leader_waits_for_a_version_that_only_the_caller_knows(cluster: Cluster) -> None:
    cluster.shapes["d2"] = cluster.shapes["d1"]
    asking = asyncio.create_task(cluster.planner.ensure(Ensure("demo:latest", digest="d2")))
    assert not (await asyncio.wait([asking], timeout=0.3))[0]
    for node in cluster.nodes.values():
        node.models = [replace(old, digest="d2") for old in node.models]
    assert (await asking).verdict is Verdict.WAIT
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy) and request.plan.digest == "d2"


async def test_a_head_with_a_late_record_is_waited_for(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.record()
        node.hidden = True
    first = await cluster.planner.ensure(ENSURE)
    second = await cluster.planner.ensure(ENSURE)
    assert second.deployment == first.deployment
    assert len(cluster.requests("deploy")) == 1
    # Memory is not planned twice either, though the records still show it free.
    cluster.nodes["a"].models.append(model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    other = await cluster.planner.ensure(Ensure("other"))
    assert other.verdict is Verdict.REFUSED
    assert other.fault == "too_big"


async def test_a_ready_deployment_is_used(cluster: Cluster) -> None:
    deployment = await load(cluster)
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.deployment, answer.node) == (Verdict.USE, deployment, "a")


async def test_a_new_leader_adopts_running_deployments(cluster: Cluster) -> None:
    deployment = await load(cluster)
    other = Leader(SETTINGS, cluster, cluster, cluster, clock=lambda: cluster.now)
    answer = await other.ensure(ENSURE)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, deployment)


async def test_a_model_whose_only_holder_restarts_is_waited_for(cluster: Cluster) -> None:
    """A stream survives an upgrade of the node, but a node that stays away is not waited for."""
    only = cluster.add("only", 2048 * MIB, model("rare:latest", "r1"))
    cluster.shapes["r1"] = cluster.shapes["d1"]
    cluster.changed()
    ask, known = Ensure("rare:latest", digest="r1"), cluster.resolve
    cluster.resolve = lambda name: (  # type: ignore[method-assign]
        replace(known(name), away=() if "only" in cluster.nodes else ("host-only",))
    )
    del cluster.nodes["only"]
    cluster.changed()
    answer = await cluster.planner.ensure(ask)
    assert answer.verdict is Verdict.PLANNING and "host-only" in answer.message
    assert "host-only" in (await cluster.planner.preview(ask)).message
    cluster.nodes["only"] = only
    cluster.changed()
    assert (await cluster.planner.ensure(ask)).verdict is Verdict.WAIT
    remove_for_good(cluster, "only")
    answer = await cluster.planner.ensure(ask)
    assert answer.verdict is Verdict.REFUSED and "those that had it are offline" in answer.message


async def test_unknown_and_ambiguous_names_are_refused(cluster: Cluster) -> None:
    answer = await cluster.planner.ensure(Ensure("nothing"))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "not_found")
    answer = await cluster.planner.ensure(Ensure("gone:latest", digest="d9"))
    assert answer.fault == "unavailable"
    assert "those that had it are offline" in answer.message
    cluster.nodes["b"].models += [model("twin:7b", "t1"), model("twin:8b", "t2")]
    answer = await cluster.planner.ensure(Ensure("twin"))
    assert answer.fault == "ambiguous"
    assert "twin:7b" in answer.message


async def test_a_model_that_is_too_big_is_refused_with_the_missing_memory(cluster: Cluster) -> None:
    remove_for_good(cluster, "c")
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.fault == "too_big"
    for word in ("needs", "Missing", "host-a", "host-b", "another machine with 1 GiB"):
        assert word in answer.message, answer.message
    assert not cluster.requests("reserve")


async def test_invalid_layer_counts_are_the_callers_error(
    cluster: Cluster,
) -> None:
    answer = await cluster.planner.ensure(Ensure("demo", fixed=(("a", 3), ("b", 4))))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "bad_request")
    assert "sum to 7" in answer.message and "17" in answer.message
    answer = await cluster.planner.ensure(Ensure("demo", fixed=(("a", 9), ("z", 8))))
    assert answer.fault == "bad_request"
    assert "no node z" in answer.message and "host-b" in answer.message
    answer = await cluster.planner.ensure(Ensure("demo", fixed=(("a", 3), ("b", 4), ("host-a", 10))))
    assert answer.fault == "bad_request"
    assert "host-a is named twice" in answer.message
    answer = await cluster.planner.ensure(Ensure("demo", fixed=(("a", 15), ("b", 2))))
    assert answer.fault == "too_big"
    assert "What would help: letting the planner decide which node gets how many layers" in answer.message
    assert (await cluster.planner.ensure(Ensure("demo", fixed=(("a", 4), ("b", 6), ("c", 7))))).deployment


async def test_layers_for_a_name_of_several_nodes_are_refused(cluster: Cluster) -> None:
    cluster.nodes["c"].name = "host-b"
    answer = await cluster.planner.ensure(Ensure("demo", fixed=(("a", 4), ("host-b", 13))))
    assert answer.fault == "bad_request"
    named = "several nodes are named host-b; name one by its id: b (127.0.0.1), c (127.0.0.1)"
    assert named in answer.message
    assert (await cluster.planner.ensure(Ensure("demo", fixed=(("a", 4), ("b", 6), ("c", 7))))).deployment


async def test_a_refused_reservation_is_released_and_planned_again(cluster: Cluster) -> None:
    cluster.add("d", 700 * MIB)
    cluster.nodes["d"].hook = refuse("only 10 MiB free", CPU=10 * MIB)
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy)
    assert "d" not in request.plan.bytes_by_owner()
    assert cluster.granted() == sum(sum(d.values()) for d in request.plan.bytes_by_owner().values())


async def test_an_unreachable_owner_is_left_out(cluster: Cluster) -> None:
    cluster.add("d", 700 * MIB)
    cluster.nodes["d"].unreachable = True
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy)
    assert "d" not in request.plan.bytes_by_owner()


async def test_reservations_are_released_if_the_head_refuses(cluster: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        return Done(False, "there is no llama.cpp") if method == "deploy" else None

    cluster.nodes["a"].hook = hook
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.REFUSED
    assert cluster.granted() == 0
    released = [request for _, request in cluster.requests("release")]
    assert all(isinstance(request, Release) for request in released)


async def test_memory_shared_by_devices_is_planned_once() -> None:
    cluster = Cluster(SETTINGS)
    both = (
        Device("CPU", Kind.CPU, "cpu", 8 * GIB, GIB, 8 * GIB, 0, 0, 10 * MIB, 20e9, 1e11, pool="ram"),
        Device("Vulkan0", Kind.GPU, "gpu", 8 * GIB, GIB, 8 * GIB, 0, 0, 10 * MIB, 60e9, 1e12, pool="ram"),
    )
    cluster.add("a", 0, model(), devices=both)
    cluster.shapes["d1"] = shape(16, 80 * MIB)
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert "room for 1004 MiB" in answer.message, "the free memory minus the reserve"
    assert not cluster.requests("reserve"), "shared memory must not be counted twice"
    cluster.shapes["d1"] = shape(16, 40 * MIB)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    assert len(cluster.requests("reserve")) == 1


async def test_a_node_limit_over_all_devices_is_respected() -> None:
    cluster = Cluster(SETTINGS)
    gpu = Device("CUDA0", Kind.GPU, "gpu", 8 * GIB, 8 * GIB, 8 * GIB, 0, 0, 10 * MIB, 300e9, 1e13)
    cpu = Device("CPU", Kind.CPU, "cpu", 8 * GIB, 8 * GIB, 8 * GIB, 0, 0, 10 * MIB, 20e9, 1e11)
    node = cluster.add("a", 0, model(), devices=(cpu, gpu))
    node.ledger = Ledger(ready=True, node_limit=1000 * MIB)
    node.ledger.measured(MeasuredMemory((cpu, gpu)))
    cluster.shapes["d1"] = shape(16, 55 * MIB)
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert "room for 980 MiB" in answer.message, "the node limit minus the reserve"
    assert cluster.granted() == 0


async def test_a_stale_leader_releases_its_reservations(cluster: Cluster) -> None:
    async def hook(method: str, request: object) -> object | None:
        if method == "reserve":
            cluster.term = Term(2, "b")
        return None

    cluster.nodes["b"].hook = hook
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.leader) == (Verdict.ELSEWHERE, "b")
    assert cluster.granted() == 0
    assert not cluster.requests("deploy")


async def test_an_outdated_term_places_nothing(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.ledger.see(Term(9, "z"))
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.REFUSED
    assert cluster.granted() == 0
    assert not cluster.requests("deploy")


async def test_reservations_of_a_dead_leader_expire(cluster: Cluster) -> None:
    stuck = asyncio.Event()

    async def hook(method: str, request: object) -> object | None:
        if method == "deploy":
            stuck.set()
            await asyncio.Event().wait()
        if method == "release":
            raise PeerError("a", "the leader is dead", transport=True)
        return None

    for node in cluster.nodes.values():
        node.hook = hook
    asking = asyncio.create_task(cluster.planner.ensure(ENSURE))
    await stuck.wait()
    await cluster.planner.close()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert cluster.granted() > 0
    cluster.now += 60.0
    for node in cluster.nodes.values():
        node.ledger.expire(cluster.now)
    assert cluster.granted() == 0
    # The next leader can place the model.
    cluster.nodes["a"].hook = None
    cluster.term = Term(2, "a")
    other = Leader(SETTINGS, cluster, cluster, cluster, clock=lambda: cluster.now)
    answer = await other.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    await other.close()


async def test_a_node_that_does_not_lead_names_the_leader(cluster: Cluster) -> None:
    cluster.term = Term(3, "b")
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.leader) == (Verdict.ELSEWHERE, "b")
    assert (await cluster.planner.unload(Drop("demo"))).leader == "b"
    cluster.term = Term()
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.ELSEWHERE


async def test_draining_nodes_and_other_builds_are_excluded(cluster: Cluster) -> None:
    cluster.add("d", 900 * MIB)
    cluster.add("e", 900 * MIB).build = "b2"
    cluster.add("f", 900 * MIB).build = ""
    cluster.nodes["b"].draining = True
    cluster.nodes["c"].draining = True
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.WAIT
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy)
    assert set(request.plan.bytes_by_owner()) == {"a", "d"}


async def test_a_cluster_without_llama_cpp_refuses() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB, model()).build = ""
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.fault == "unavailable"
    assert "llama.cpp" in answer.message


async def test_an_embedding_request_gets_its_own_deployment(cluster: Cluster) -> None:
    cluster.add("d", 4 * GIB)
    first = await load(cluster)
    answer = await cluster.planner.ensure(replace(ENSURE, embedding=True))
    assert answer.verdict is Verdict.WAIT
    assert answer.deployment != first
    plan = [r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy)][-1]
    assert plan.run.embedding
    assert plan.run.batch == plan.run.ubatch


async def test_a_replica_needs_free_memory(cluster: Cluster) -> None:
    first = await load(cluster, active=1, waiting=9)
    answer = await cluster.planner.ensure(replace(ENSURE, more=True))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, first)
    cluster.add("d", 2 * GIB, model())
    answer = await cluster.planner.ensure(replace(ENSURE, more=True))
    assert answer.verdict is Verdict.WAIT
    assert answer.node == "d"


async def test_an_unload_ends_a_deployment_that_only_the_caller_sees(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.record()
        node.hidden = True
    answer = await cluster.planner.ensure(ENSURE)
    cluster.planner._observations.ended(answer.deployment, cluster.now)
    assert (await cluster.planner.unload(Drop("demo"))).ended == ()
    seen = ((answer.node, answer.deployment),)
    assert (await cluster.planner.unload(Drop("demo", seen=seen))).ended == (answer.deployment,)


async def test_an_unload_ends_a_deployment_that_was_just_ordered(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.record()
        node.hidden = True
    answer = await cluster.planner.ensure(ENSURE)
    assert (await cluster.planner.unload(Drop("demo"))).ended == (answer.deployment,)


async def test_the_preview_places_nothing(cluster: Cluster) -> None:
    preview = await cluster.planner.preview(ENSURE)
    assert preview.ok
    assert preview.plan is not None
    assert preview.weights > 800 * MIB
    assert preview.context == 2048
    assert {free.node for free in preview.free} == {"a", "b", "c"}
    assert all(0 <= free.after < free.before for free in preview.free)
    before = preview.free
    assert preview.plan.tokens_per_second > 0
    assert not cluster.calls_made
    deployment = await load(cluster)
    preview = await cluster.planner.preview(ENSURE)
    assert (preview.verdict, preview.endpoint) == (Verdict.USE, deployment)
    assert preview.plan is not None
    assert preview.free == before, "free memory is computed without the deployment that would be replaced"
    remove_for_good(cluster, "c")
    cluster.nodes["a"].endpoints.clear()
    preview = await cluster.planner.preview(ENSURE)
    assert not preview.ok
    assert preview.missing is not None
    assert preview.missing.missing > 0
    assert (await cluster.planner.preview(Ensure("nothing"))).verdict is Verdict.REFUSED


async def test_a_threshold_distributes_a_model_that_fits_one_node() -> None:
    cluster = Cluster(replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3)))
    cluster.add("a", 2 * GIB, model())
    cluster.add("b", 2 * GIB)
    await cluster.planner.ensure(ENSURE)
    ((_, request),) = cluster.requests("deploy")
    assert isinstance(request, Deploy)
    assert set(request.plan.bytes_by_owner()) == {"a", "b"}
    del cluster.nodes["b"]
    cluster.nodes["a"].endpoints.clear()
    preview = await cluster.planner.preview(ENSURE)
    assert preview.plan is not None and set(preview.plan.bytes_by_owner()) == {"a"}


async def test_a_cache_that_the_models_heads_do_not_fit_is_refused_or_unquantized() -> None:
    placement = replace(SETTINGS.placement, type_k="q8_0")
    cluster = Cluster(replace(SETTINGS, placement=placement))
    cluster.add("a", 3 * GIB, model())
    cluster.shapes["d1"] = shape(n_embd=1280)
    answer = await cluster.planner.ensure(replace(ENSURE, type_k="q4_0", type_v="q8_0"))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, Fault.BAD_REQUEST.value)
    assert "no KV cache in q4_0 and q8_0: its heads of 80 elements" in answer.message
    plan = (await cluster.planner.preview(ENSURE)).plan
    assert plan is not None
    assert (plan.run.type_k, plan.run.type_v) == ("f16", "f16")
    assert any("heads of 80 elements can't be quantized" in reason for reason in plan.reasons)
    # Nor is it suggested where memory is short.
    cluster.nodes["a"].ledger.measured(MeasuredMemory((cpu_device(600 * MIB),)))
    preview = await cluster.planner.preview(replace(ENSURE, context=8192))
    assert preview.missing is not None
    assert not any("q8_0" in remedy for remedy in preview.missing.remedies)


def external(address: str) -> Device:
    size = 450 * MIB
    return Device(address, Kind.EXTERNAL, "external worker", size, size, size, 0, size)


@pytest.mark.parametrize(("address", "fits"), [("10.0.0.5:50052", False), ("127.0.0.1:50052", True)])
async def test_an_external_worker_that_two_nodes_name_counts_once(address: str, fits: bool) -> None:
    """A loopback address is another worker on each node."""
    cluster = Cluster(SETTINGS)
    cluster.add("a", 0, model(), devices=(cpu_device(300 * MIB), external(address)))
    cluster.add("b", 0, devices=(cpu_device(100 * MIB), external(address)))
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is (Verdict.WAIT if fits else Verdict.REFUSED)


async def test_an_external_worker_in_use_is_offered_by_no_other_node() -> None:
    cluster = Cluster(SETTINGS)
    for node in "ab":
        cluster.add(node, 0, model(), devices=(cpu_device(700 * MIB), external("10.0.0.5:50052")))
    first = await cluster.planner.ensure(ENSURE)
    assert first.verdict is Verdict.WAIT
    cluster.ready(first.deployment, active=1)
    assert (await cluster.planner.ensure(replace(ENSURE, more=True))).verdict is not Verdict.WAIT
    assert len(cluster.requests("deploy")) == 1


async def test_what_would_help_a_model_to_be_spread_is_tried_on_one_machine_too() -> None:
    cluster = Cluster(replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3)))
    cluster.add("a", 850 * MIB, model())
    preview = await cluster.planner.preview(ENSURE)
    assert preview.missing is not None and 0 < preview.missing.missing < 300 * MIB
    assert any("a smaller quantization" in remedy for remedy in preview.missing.remedies)


async def test_a_smaller_quantization_that_the_cluster_has_is_named() -> None:
    cluster = Cluster(SETTINGS)
    others = [
        model("demo:q4_K_M", "d2", size=500 * MIB),
        model("demo:q6_K", "d3", size=750 * MIB),
        model("demo:other", "d4", size=510 * MIB, layers=8),
        model("mine:q4_K_M", "d5", size=510 * MIB),
    ]
    cluster.add("a", 700 * MIB, model(), *others)
    preview = await cluster.planner.preview(ENSURE)
    assert preview.missing is not None
    (remedy,) = [text for text in preview.missing.remedies if "quantization" in text]
    assert "model: demo:q4_K_M, which is here, or another file of at most" in remedy
