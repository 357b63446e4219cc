"""Models in Ollama, and models that a build of llama.cpp can't read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, State
from sollold.engines.commands import Deploy
from sollold.leader import leader
from sollold.leader.messages import Verdict
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from tests.doubles import until
from tests.leader.cluster import (
    ENSURE,
    SETTINGS,
    Cluster,
    cpu_device,
    let_leader_look,
    model,
    offer_in_ollama,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_ollama_is_preferred_if_the_model_fits() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model())
    node.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False
    )
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, "ollama:demo:latest")
    assert (await cluster.planner.ensure(replace(ENSURE, ollama=False))).verdict is Verdict.WAIT


async def test_an_ollama_with_unreadable_files_is_used() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model(manifest="a" * 64))
    other = cluster.add("b", 2 * GIB)
    other.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "a" * 64, Backend.OLLAMA, State.READY, loaded=True
    )
    ask = replace(ENSURE, digest="d1", in_ollama=InOllama(("demo:latest",), ("a" * 64,)))
    answer = await cluster.planner.ensure(ask)
    assert (answer.verdict, answer.node) == (Verdict.USE, "b")
    other.endpoints["ollama:demo:latest"] = replace(
        other.endpoints["ollama:demo:latest"], model="mario:latest"
    )
    assert (await cluster.planner.ensure(ask)).verdict is Verdict.WAIT
    assert node.endpoints


async def test_the_threshold_shards_a_model_even_if_ollama_could_hold_it() -> None:
    settings = replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3))

    def two_nodes() -> Cluster:
        cluster = Cluster(settings)
        cluster.add("a", 2 * GIB, model())
        cluster.add("b", 2 * GIB)
        return cluster

    cluster = two_nodes()
    offer_in_ollama(cluster, "a")
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.WAIT
    cluster = two_nodes()
    offer_in_ollama(cluster, "a", loaded=True)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.USE, "an already loaded model answers"
    cluster.nodes["a"].models[:] = [model(only_ollama="stock llama.cpp can't read it")]
    offer_in_ollama(cluster, "a")
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.USE, "nothing else can run it"


async def test_an_ollama_without_memory_for_the_context_is_skipped(cluster: Cluster) -> None:
    cluster.nodes["a"].ledger.measured(MeasuredMemory((replace(cpu_device(900 * MIB), available=0),)))
    offer = offer_in_ollama(cluster, "a")
    answer = await cluster.planner.ensure(replace(ENSURE, context=2048))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, offer)
    long = await cluster.planner.ensure(replace(ENSURE, context=32768))
    assert long.verdict is not Verdict.USE or long.deployment != offer


async def test_ollama_is_the_last_resort_for_a_model_that_cannot_be_placed() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 300 * MIB, model())
    refused = await cluster.planner.ensure(ENSURE)
    assert refused.fault == "too_big"
    offer = offer_in_ollama(cluster, "a")
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, offer)
    assert "nothing else can run it" in answer.reasons[0]
    again = await cluster.planner.ensure(replace(ENSURE, ollama=False))
    assert again.fault == "too_big", "without Ollama the missing memory is reported"


async def test_a_model_that_keeps_failing_is_given_to_ollama(cluster: Cluster) -> None:
    for _ in range(3):
        answer = await cluster.planner.ensure(ENSURE)
        if answer.verdict is Verdict.WAIT:
            cluster.ready(answer.deployment, state=State.FAILED, reason="unknown tensor type")
            for node in cluster.nodes.values():
                node.ledger.end_deployment(answer.deployment, "failed")
                node.ledger.ended(answer.deployment)
    assert "it failed 2 times" in (await cluster.planner.ensure(ENSURE)).message
    offer = offer_in_ollama(cluster, "a")
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, offer)


async def test_models_only_for_ollama_and_unusable_models_are_refused() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model(only_ollama="stock llama.cpp can't read it"))
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.fault == "unavailable"
    assert "can't read it" in answer.message
    node.models[:] = [model(unusable="the file is cut short; fetch it again")]
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.fault == "bad_request"
    assert "cut short" in answer.message


async def test_a_long_ollama_queue_adds_a_replica_and_exceptions_do_not_end_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    cluster.add("b", 2 * GIB, model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    offer = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, waiting=9)
    other = replace(offer, id="ollama:other:latest", model="other:latest", digest="d2")
    cluster.nodes["a"].endpoints[offer.id] = offer
    cluster.nodes["b"].endpoints[other.id] = other
    read_shape = cluster.shape

    async def broken(node: str, model: Model) -> Shape:
        if model.digest == "d1":
            raise RuntimeError("a bug")
        return await read_shape(node, model)

    cluster.shape = broken  # type: ignore[method-assign]
    await cluster.planner.start()
    try:
        await let_leader_look(cluster, 0.0)
        cluster.now += 11.0
        await until(lambda: cluster.requests("deploy"))
        plans = [request.plan for _, request in cluster.requests("deploy") if isinstance(request, Deploy)]
        assert [(plan.model, plan.head) for plan in plans] == [("other:latest", "b")]
        cluster.shape = read_shape  # type: ignore[method-assign]
        cluster.now += 61.0
        await until(lambda: len(cluster.requests("deploy")) > 1)
        assert {
            request.plan.model for _, request in cluster.requests("deploy") if isinstance(request, Deploy)
        } == {
            "demo:latest",
            "other:latest",
        }
    finally:
        await cluster.planner.close()


async def test_a_model_unreadable_by_one_build_is_not_given_to_other_nodes_with_it(cluster: Cluster) -> None:
    learned = "llama.cpp b1 can't read it: unknown tensor type"
    cluster.nodes["a"].models[:] = [model(only_ollama=learned)]
    cluster.add("d", 2 * GIB, model())
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.REFUSED and learned in answer.message
    offer = offer_in_ollama(cluster, "d")
    assert (await cluster.planner.ensure(ENSURE)).deployment == offer
    cluster.nodes["d"].endpoints.clear()
    cluster.nodes["d"].build = "b2"
    assert (await cluster.planner.ensure(ENSURE)).node == "d", "another build may read it"


async def test_a_node_without_files_does_not_prove_a_model_unreadable(cluster: Cluster) -> None:
    cluster.nodes["a"].models[:] = [model(files=(), only_ollama="its files can't be read there")]
    cluster.add("d", 2 * GIB, model())
    assert (await cluster.planner.ensure(ENSURE)).node == "d"
