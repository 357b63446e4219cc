"""A request that crashes an engine gets no second one, and is refused for a while."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend
from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.machine.device import Device, Kind
from sollold.models.gguf import demo_model
from sollold.serving.engine_deaths import PERIOD, Quarantine
from sollold.serving.request import Answer
from tests.api.direct_service import LlamaServer
from tests.doubles import until
from tests.serving.cluster_double import Cluster, Node, ask, said
from tests.serving.reciter import TEXT, Reciter


async def give(node: Node, *args: Any, **more: Any) -> list[dict[str, Any]]:
    answer: Answer = await node.serving.open(ask(*args, **more), lambda _: None)
    return [json.loads(event) async for event in answer.events]


async def three(
    cluster: Cluster, reason: str = "it was terminated by SIGSEGV"
) -> tuple[Node, Reciter, Reciter]:
    """Node a, which is asked; b and c have an engine each, which crashes over ``deadly``."""
    a, b, c = [await cluster.node(name) for name in "abc"]
    one, other = await cluster.reciter(), await cluster.reciter()
    for node, id, reciter in ((b, "d1", one), (c, "d2", other)):
        node.engines.serve(id, reciter, slots=8)
        reciter.poison = "deadly"

        def crash(node: Node = node, id: str = id) -> None:
            # Its exit is noticed a moment after the connection broke.
            asyncio.get_running_loop().call_later(0.05, node.engines.crash, id, reason)

        reciter.on_death = crash
    return a, one, other


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", ["a", "b", "c"])
async def test_a_request_that_crashes_an_engine_gets_no_second_one(
    cluster: Cluster, stream: bool, asked: str
) -> None:
    await three(cluster)
    node = cluster.nodes["abc".index(asked)]
    one, other = cluster.reciters
    for id in ("first", "again"):
        with pytest.raises(Refusal) as refused:
            await give(node, stream=stream, id=id, grammar="deadly")
        assert (refused.value.fault, refused.value.status) == (Fault.BAD_REQUEST, 422)
        assert "crashed" in refused.value.message
    assert one.deaths + other.deaths == 1
    assert said(await give(node, id="other")) == TEXT


async def test_other_requests_in_the_engine_are_answered_elsewhere(cluster: Cluster) -> None:
    a, one, other = await three(cluster)
    one.gate.clear()
    other.gate.clear()
    waiting = [asyncio.create_task(give(a, id=f"good{n}")) for n in range(4)]
    await until(lambda: one.running + other.running == 4)
    with pytest.raises(Refusal) as refused:
        await give(a, grammar="deadly")
    assert refused.value.status == 422
    for reciter in (one, other):
        reciter.gate.set()
    for answer in await asyncio.gather(*waiting):
        assert said(answer) == TEXT
    assert one.deaths + other.deaths == 1


async def test_want_of_memory_is_not_the_requests_doing(cluster: Cluster) -> None:
    a, one, other = await three(cluster, reason="it ran out of memory (CUDA error: out of memory)")
    other.poison = one.poison
    one.on_death, other.poison = one.on_death, ""
    one_first = cluster.nodes[2].view
    one_first.update_me(endpoints=tuple(e for e in one_first.me.endpoints if e.id != "d2"))
    asking = asyncio.create_task(give(a, prompt_note="deadly"))
    await until(lambda: one.deaths == 1)
    cluster.nodes[2].engines.serve("d3", other)
    assert said(await asking) == TEXT


CRASH = "llama runner process has terminated: signal: segmentation fault (core dumped)"


@pytest.mark.parametrize(
    ("error", "loaded", "asked"),
    [
        (CRASH, True, 1),
        (CRASH, False, 2),
        ("llama runner process has terminated: cudaMalloc failed: out of memory", True, 2),
    ],
)
async def test_a_request_over_which_an_ollamas_runner_crashes_gets_no_second_one(
    cluster: Cluster, error: str, loaded: bool, asked: int
) -> None:
    a, b = await cluster.node("a"), await cluster.node("b")
    one, other = await cluster.reciter(), await cluster.reciter()
    a.engines.serve("ollama:m", one, backend=Backend.OLLAMA, loaded=loaded)
    b.engines.serve("ollama:n", other, backend=Backend.OLLAMA, loaded=loaded)
    a.names.size = 0
    device = Device("CPU", Kind.CPU, "cpu", 100, 100, 100, 0, 100)
    for node in (a, b):
        node.view.update_me(devices=(device,))
    for reciter in (one, other):
        reciter.status, reciter.error = 500, error
    with pytest.raises(Refusal) as refused:
        await give(a, "ollama")
    assert len(one.requests) + len(other.requests) == asked
    assert refused.value.status == (422 if asked == 1 else 500)


def test_what_crashed_an_engine_is_refused_for_a_while() -> None:
    quarantine = Quarantine()
    quarantine.check(ask(), 0.0)
    quarantine.add(ask(grammar="deadly"), 0.0)
    quarantine.check(ask(), 1.0)
    for again in (ask(grammar="deadly", id="other"), ask(grammar="deadly", user="me")):
        with pytest.raises(Refusal, match="refused for 9 min"):
            quarantine.check(again, 60.0)
    quarantine.check(ask(grammar="deadly"), PERIOD)


def test_the_same_words_with_other_options_are_not_refused() -> None:
    """An option crashed the engine, such as a num_thread that the machine hasn't."""
    quarantine = Quarantine()
    quarantine.add(ask("ollama", options={"num_thread": 100_000, "seed": 1}), 0.0)
    for options in ({}, None, {"num_thread": 4}):
        quarantine.check(ask("ollama", options=options), 1.0)
    with pytest.raises(Refusal, match="refused for 9 min"):
        quarantine.check(ask("ollama", options={"num_thread": 100_000, "seed": 2}), 60.0)


def test_only_so_many_are_remembered() -> None:
    quarantine = Quarantine()
    for n in range(1000):
        quarantine.add(ask(grammar=str(n)), 0.0)
    assert len(quarantine._until) <= 256
    with pytest.raises(Refusal):
        quarantine.check(ask(grammar="999"), 1.0)


@pytest.mark.llama
async def test_a_grammar_that_crashes_a_real_llama_server_reaches_one_of_two(
    cluster: Cluster, llama: Llama, tmp_path: Path
) -> None:
    demo_model.write(tmp_path / "demo.gguf")
    a, b, c = [await cluster.node(name) for name in "abc"]
    with LlamaServer(llama.server, tmp_path / "demo.gguf") as one:
        with LlamaServer(llama.server, tmp_path / "demo.gguf") as other:
            b.engines.serve("d1", one, slots=2)
            c.engines.serve("d2", other, slots=2)

            async def watch(node: Node, id: str, server: LlamaServer) -> None:
                await until(lambda: server.exit_code is not None, 60)
                if server.exit_code in (-signal.SIGSEGV, -signal.SIGABRT):
                    node.engines.crash(id)

            watching = [asyncio.create_task(watch(b, "d1", one)), asyncio.create_task(watch(c, "d2", other))]
            grammar = "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000
            for id in ("first", "again"):
                with pytest.raises(Refusal) as refused:
                    await give(a, "native", id=id, grammar=grammar)
                assert refused.value.status == 422
            assert [one.exit_code, other.exit_code].count(None) == 1
            assert said(await give(a, "native", id="good", n_predict=20))
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
