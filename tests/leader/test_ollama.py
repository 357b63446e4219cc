"""Models that an Ollama has, and content that a llama.cpp can not read."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, State
from sollold.engines.commands import Deploy
from sollold.leader import leader
from sollold.leader.messages import Verdict
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from tests.leader.cluster import (
    ASK,
    SETTINGS,
    Cluster,
    cpu_device,
    model,
    offered,
)
from tests.placement.fleets import GIB, MIB, shape


async def test_ollama_first_where_it_fits() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model())
    node.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False
    )
    answer = await cluster.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, "ollama:demo:latest")
    assert (await cluster.planner.ensure(replace(ASK, ollama=False))).verdict is Verdict.WAIT


async def test_an_ollama_whose_files_its_node_can_not_read_is_used() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model(manifest="a" * 64))
    other = cluster.add("b", 2 * GIB)
    other.endpoints["ollama:demo:latest"] = Endpoint(
        "ollama:demo:latest", "demo:latest", "a" * 64, Backend.OLLAMA, State.READY, loaded=True
    )
    ask = replace(ASK, digest="d1", in_ollama=InOllama(("demo:latest",), ("a" * 64,)))
    answer = await cluster.planner.ensure(ask)
    assert (answer.verdict, answer.node) == (Verdict.USE, "b")
    other.endpoints["ollama:demo:latest"] = replace(
        other.endpoints["ollama:demo:latest"], model="mario:latest"
    )
    assert (await cluster.planner.ensure(ask)).verdict is Verdict.WAIT
    assert node.endpoints


async def test_a_model_that_is_to_be_sharded_is_so_though_an_ollama_could_hold_it() -> None:
    settings = replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=0.3))

    def two() -> Cluster:
        cluster = Cluster(settings)
        cluster.add("a", 2 * GIB, model())
        cluster.add("b", 2 * GIB)
        return cluster

    cluster = two()
    offered(cluster, "a")
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.WAIT
    cluster = two()
    offered(cluster, "a", loaded=True)
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.USE, "what is loaded there already answers"
    cluster.nodes["a"].models[:] = [model(only_ollama="stock llama.cpp can't read it")]
    offered(cluster, "a")
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.USE, "nothing else can run it"


async def test_an_ollama_without_room_for_the_context_is_passed_over(cluster: Cluster) -> None:
    cluster.nodes["a"].ledger.measured(MeasuredMemory((replace(cpu_device(900 * MIB), available=0),)))
    named = offered(cluster, "a")
    answer = await cluster.planner.ensure(replace(ASK, context=2048))
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)
    long = await cluster.planner.ensure(replace(ASK, context=32768))
    assert long.verdict is not Verdict.USE or long.deployment != named


async def test_an_ollama_is_the_last_resort_of_what_can_not_be_placed() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 300 * MIB, model())
    refused = await cluster.planner.ensure(ASK)
    assert refused.fault == "too_big"
    named = offered(cluster, "a")
    answer = await cluster.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)
    assert "nothing else can run it" in answer.reasons[0]
    again = await cluster.planner.ensure(replace(ASK, ollama=False))
    assert again.fault == "too_big", "where the Ollama has failed too the arithmetic is told"


async def test_what_fails_again_and_again_is_given_to_an_ollama_that_has_it(cluster: Cluster) -> None:
    for _ in range(3):
        answer = await cluster.planner.ensure(ASK)
        if answer.verdict is Verdict.WAIT:
            cluster.ready(answer.deployment, state=State.FAILED, reason="unknown tensor type")
            for node in cluster.nodes.values():
                node.ledger.end_deployment(answer.deployment, "failed")
                node.ledger.ended(answer.deployment)
    assert "it failed 2 times" in (await cluster.planner.ensure(ASK)).message
    named = offered(cluster, "a")
    answer = await cluster.planner.ensure(ASK)
    assert (answer.verdict, answer.deployment) == (Verdict.USE, named)


async def test_ollama_only_models_and_unusable_ones() -> None:
    cluster = Cluster(SETTINGS)
    node = cluster.add("a", 2 * GIB, model(only_ollama="stock llama.cpp can't read it"))
    answer = await cluster.planner.ensure(ASK)
    assert answer.fault == "unavailable"
    assert "can't read it" in answer.message
    node.models[:] = [model(unusable="the file is cut short; fetch it again")]
    answer = await cluster.planner.ensure(ASK)
    assert answer.fault == "bad_request"
    assert "cut short" in answer.message


async def test_an_ollamas_long_line_gets_a_llama_server_beside_it_and_faults_do_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    cluster.add("b", 2 * GIB, model("other:latest", "d2"))
    cluster.shapes["d2"] = shape()
    one = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, waiting=9)
    other = replace(one, id="ollama:other:latest", model="other:latest", digest="d2")
    cluster.nodes["a"].endpoints[one.id] = one
    cluster.nodes["b"].endpoints[other.id] = other
    usual = cluster.shape

    async def broken(node: str, asked: Model) -> Shape:
        if asked.digest == "d1":
            raise RuntimeError("a fault of our own")
        return await usual(node, asked)

    cluster.shape = broken  # type: ignore[method-assign]
    await cluster.planner.start()
    try:
        await asyncio.sleep(0.05)
        cluster.now += 11.0
        for _ in range(300):
            if cluster.asked("deploy"):
                break
            await asyncio.sleep(0.01)
        plans = [request.plan for _, request in cluster.asked("deploy") if isinstance(request, Deploy)]
        assert [(plan.model, plan.head) for plan in plans] == [("other:latest", "b")]
        cluster.shape = usual  # type: ignore[method-assign]
        cluster.now += 61.0
        for _ in range(300):
            if len(cluster.asked("deploy")) > 1:
                break
            await asyncio.sleep(0.01)
        assert {
            request.plan.model for _, request in cluster.asked("deploy") if isinstance(request, Deploy)
        } == {
            "demo:latest",
            "other:latest",
        }
    finally:
        await cluster.planner.close()


async def test_what_one_nodes_llama_cpp_can_not_read_none_of_that_build_is_asked_to(cluster: Cluster) -> None:
    learnt = "llama.cpp b1 can't read it: unknown tensor type"
    cluster.nodes["a"].models[:] = [model(only_ollama=learnt)]
    cluster.add("d", 2 * GIB, model())
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.REFUSED and learnt in answer.message
    named = offered(cluster, "d")
    assert (await cluster.planner.ensure(ASK)).deployment == named
    cluster.nodes["d"].endpoints.clear()
    cluster.nodes["d"].build = "b2"
    assert (await cluster.planner.ensure(ASK)).node == "d", "another build may read it"


async def test_an_api_that_knows_no_files_says_nothing_of_the_content(cluster: Cluster) -> None:
    cluster.nodes["a"].models[:] = [model(files=(), only_ollama="its files can't be read there")]
    cluster.add("d", 2 * GIB, model())
    assert (await cluster.planner.ensure(ASK)).node == "d"
