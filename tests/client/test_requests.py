"""Requests, answers and errors of the client against the real API with a scripted service."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sollold.api.http.response import KeepAlive
from sollold.client import (
    ClientError,
    HybridRouter,
    InsufficientMemory,
    OllamaPool,
    RequestTimeout,
    sync_wrapper,
)
from sollold.client.background import loop as background_loop
from sollold.control.cluster import Planned
from sollold.errors import Fault, Refusal
from sollold.serving.request import Engine, Waiting
from tests.api.api_parts import PlainCluster, ScriptedService, call_of, chunk, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.conftest import serve as serve  # a fixture
from tests.doubles import until
from tests.ollama_standin import Standin

HELLO = [{"role": "user", "content": "hi"}]
ANSWER = (chunk("Hel"), chunk("lo"), chunk(finish="stop"), usage_chunk(3, 2))


async def test_an_answer_is_ollamas_with_routing(serve: Serve) -> None:
    service = ScriptedService(*ANSWER)
    async with HybridRouter(node=await serve(parts(service))) as router:
        answer = await router.route_request("demo", HELLO, priority=8, max_tokens=9, temperature=0.5)
        assert answer["message"] == {"role": "assistant", "content": "Hello"}
        assert answer["eval_count"] == 2 and answer["done_reason"] == "stop"
        assert answer["_routing"]["backend"] == "llama.cpp-distributed"
        assert answer["_routing"]["node"] == "beta"
        body = call_of(service).body
        assert (body["n_predict"], body["temperature"], service.asks[-1].priority) == (9, 0.5, 8)
        # The router learned the coordinator from the answer.
        assert router.coordinator is not None and router.coordinator.is_running()
        assert router.coordinator.base_url == "http://10.0.0.1:11435"
        assert len(router.coordinator.rpc_backends) == 1


async def test_an_ollama_is_refused_as_a_node() -> None:
    standin = Standin([])
    url = await standin.start()
    try:
        async with HybridRouter(node=url) as router:
            with pytest.raises(ClientError, match=f"{url} is not sollold.*port 11435"):
                await router.route_request("demo", HELLO)
    finally:
        await standin.close()


async def test_a_stream_yields_records(serve: Serve) -> None:
    async with OllamaPool(await serve(parts(ScriptedService(*ANSWER)))) as pool:
        records = [record async for record in await pool.chat("demo", HELLO, stream=True)]
        assert [record["message"]["content"] for record in records] == ["Hel", "lo", ""]
        text = [record["response"] async for record in await pool.generate("demo", "hi", stream=True)]
        assert "".join(text) == "Hello"


@pytest.mark.parametrize("stream", [True, False])
async def test_streaming_may_be_decided_by_a_variable(serve: Serve, stream: bool) -> None:
    """With a variable ``stream``, mypy knows both types of the answer."""
    pool = OllamaPool(await serve(parts(ScriptedService(*ANSWER))))
    answers = (
        await HybridRouter(pool).route_request("demo", HELLO, stream=stream),
        await pool.chat("demo", HELLO, stream=stream),
        await pool.generate("demo", "hi", stream=stream),
    )
    for answer in answers:
        records = [answer] if isinstance(answer, dict) else [record async for record in answer]
        assert records[-1]["done"] and (len(records) > 1) is stream

    def ask() -> None:
        with sync_wrapper.HybridRouter(sync_wrapper.OllamaPool(next(iter(pool.client.nodes)).url)) as router:
            for answer in (
                router.route_request("demo", HELLO, stream=stream),
                router.generate("demo", "hi", stream=stream),
            ):
                records = [answer] if isinstance(answer, dict) else list(answer)
                assert records[-1]["done"] and (len(records) > 1) is stream

    await asyncio.to_thread(ask)
    await pool.close()


async def test_tool_calls_and_thinking_are_assembled(serve: Serve) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    events = (chunk(reasoning_content="hm"), chunk(tool_calls=[call]), chunk(finish="tool_calls"))
    async with OllamaPool(await serve(parts(ScriptedService(*events)))) as pool:
        answer = await pool.chat("demo", HELLO)
    assert answer["message"]["thinking"] == "hm"
    assert [tool_call["function"]["name"] for tool_call in answer["message"]["tool_calls"]] == ["f"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_raises_and_ends_the_generation(serve: Serve, stream: bool) -> None:
    service = ScriptedService(chunk("a"), 30.0, chunk("b"))
    async with OllamaPool(await serve(parts(service))) as pool:
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError) as late:
            answer = await pool.chat("demo", HELLO, timeout=0.3, stream=stream)
            if not isinstance(answer, dict):
                async for _ in answer:
                    pass
        assert isinstance(late.value, RequestTimeout) and late.value.status == 504
        assert asyncio.get_running_loop().time() - began < 5
    assert 0 < service.asks[-1].deadline <= 0.3, "the daemon received the timeout"
    await until(lambda: service.closed > 0)


async def test_a_coordinator_that_does_not_start_times_out(serve: Serve) -> None:
    service = ScriptedService(*ANSWER)
    service.gate, service.waitings = asyncio.Event(), [Waiting("loading", 0.1)]
    url = await serve(parts(service), KeepAlive(grace=0.02, every=0.05))
    async with HybridRouter(node=url, coordinator_timeout=0.4) as router:
        with pytest.raises(TimeoutError, match="coordinator did not start"):
            await router.route_request("demo", HELLO)
        await until(lambda: service.cancelled == 1)


async def test_closing_a_stream_ends_the_generation(serve: Serve) -> None:
    service = ScriptedService(chunk("a"), chunk("b"), 30.0, chunk("c"))
    async with OllamaPool(await serve(parts(service))) as pool:
        records = await pool.chat("demo", HELLO, stream=True)
        assert (await anext(records))["message"]["content"] == "a"
        await records.aclose()
        await until(lambda: service.closed > 0)


async def test_insufficient_memory_carries_its_numbers(serve: Serve) -> None:
    service = ScriptedService(Refusal(Fault.TOO_BIG, "demo does not fit."))
    cluster = PlainCluster()
    missing = {"needed": 100, "there": 60, "missing": 40, "remedies": ["a smaller context"]}
    cluster.planned = Planned(False, "demo does not fit.", {"missing": missing})
    async with HybridRouter(node=await serve(parts(service, cluster=cluster))) as router:
        for ask in (router.route_request("demo", HELLO), router.explain("demo")):
            with pytest.raises(InsufficientMemory, match="does not fit") as short:
                await ask
            assert (short.value.needed, short.value.there, short.value.missing) == (100, 60, 40)
            assert short.value.remedies == ("a smaller context",) and short.value.status == 507


class Embedding(ScriptedService):
    """An Ollama that embeds each text as its length."""

    async def _play(self) -> AsyncIterator[bytes]:
        texts = self.asks[-1].calls[Engine.OLLAMA].body["input"]
        texts = [texts] if isinstance(texts, str) else texts
        yield json.dumps({"model": "demo", "embeddings": [[float(len(text))] for text in texts]}).encode()


async def test_many_texts_are_embedded_in_order(serve: Serve) -> None:
    service = Embedding(engine=Engine.OLLAMA)
    async with HybridRouter(node=await serve(parts(service))) as router:
        reply = await router.embed("demo", "four", priority="HIGH", timeout=20)
        assert reply["embeddings"] == [[4.0]] and service.asks[-1].priority == 7
        texts = ["x" * length for length in range(1, 131)]
        vectors = await router.batch_embed("demo", texts, concurrency=1)
        assert vectors == [[float(length)] for length in range(1, 131)]
        assert len(service.asks) == 4, "texts are sent in batches"
        assert await router.batch_embed("demo", ["a", ""]) == [[1.0], [0.0]]


async def test_refusals_keep_the_daemons_message(serve: Serve) -> None:
    url = await serve(parts(ScriptedService(chunk("a"), Refusal(Fault.INTERRUPTED, "the worker died"))))
    async with HybridRouter(node=url) as router:
        with pytest.raises(ClientError, match="not found") as missing:
            await router.route_request("nobody", HELLO)
        assert missing.value.status == 404
        got = []
        with pytest.raises(ClientError, match="the worker died") as died:
            async for record in await router.route_request("demo", HELLO, stream=True):
                got.append(record["message"]["content"])  # noqa: PERF401
        assert (got, died.value.status) == (["a"], 502)
        assert died.value.__cause__ is None, "an error must not be its own cause"


async def test_an_absent_node_is_skipped(serve: Serve) -> None:
    url = await serve(parts(ScriptedService(*ANSWER)))
    async with HybridRouter(node=["http://127.0.0.1:9", url]) as router:
        answer = await router.route_request("demo", HELLO)
        assert answer["message"]["content"] == "Hello"
        assert "lost_nodes" not in answer["_routing"]
    async with HybridRouter(node="http://127.0.0.1:9") as router:
        with pytest.raises(ClientError, match="no daemon answers") as nobody:
            await router.route_request("demo", HELLO)
        assert nobody.value.status == 0


async def test_blocking_calls_from_several_threads_and_inside_a_loop(serve: Serve) -> None:
    url = await serve(parts(ScriptedService(*ANSWER)))
    router = sync_wrapper.HybridRouter(node=url)
    answers: list[Any] = []

    def ask() -> None:
        answers.append(router.route_request("demo", HELLO)["message"]["content"])
        answers.append(
            "".join(
                record["message"]["content"] for record in router.route_request("demo", HELLO, stream=True)
            )
        )

    async def ask_in_a_loop() -> None:
        ask()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads.append(threading.Thread(target=lambda: asyncio.run(ask_in_a_loop())))
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert answers == ["Hello"] * 10
    await asyncio.to_thread(router.close)


async def test_a_blocking_call_on_the_clients_own_loop_is_an_error(serve: Serve) -> None:
    pool = sync_wrapper.OllamaPool(await serve(parts(ScriptedService(*ANSWER))))

    async def inside() -> None:
        with pytest.raises(RuntimeError, match="own event loop"):
            pool.list()

    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(inside(), background_loop()))
    names = [model["name"] for model in await asyncio.to_thread(pool.list)]
    assert names == ["demo:latest"]
    await asyncio.to_thread(pool.close)


async def test_statistics_with_and_without_an_event_loop(serve: Serve) -> None:
    router = HybridRouter(node=await serve(parts(ScriptedService(*ANSWER))))
    stats = await router.get_stats()
    assert stats["distributed_requests"] == 0 and list(stats["nodes"]) == ["alpha"]
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats, (
        "the statistics can be pickled and copied"
    )
    with pytest.raises(KeyError, match=r"distributed_requests .* is awaited"):
        router.get_stats()["distributed_requests"]
    assert (await asyncio.to_thread(router.get_stats)) == stats | {
        "nodes": {"alpha": {**stats["nodes"]["alpha"], "uptime_seconds": pytest.approx(5, abs=60)}}
    }
    await router.close()


async def test_a_client_works_on_consecutive_event_loops(serve: Serve) -> None:
    pool = OllamaPool(await serve(parts(ScriptedService(*ANSWER))))

    async def ask() -> str:
        return str((await pool.chat("demo", HELLO))["message"]["content"])

    for _ in range(2):
        assert await asyncio.to_thread(lambda: asyncio.run(ask())) == "Hello"


async def test_a_client_works_on_concurrent_event_loops(serve: Serve) -> None:
    router = HybridRouter(node=await serve(parts(ScriptedService(*ANSWER))))
    all_streams_began = threading.Barrier(4, timeout=30)

    async def ask() -> str:
        texts: list[str] = []
        async for record in await router.route_request("demo", HELLO, stream=True):
            if not texts:
                all_streams_began.wait()
            texts.append(record["message"]["content"])
        await router.close()
        again = await router.route_request("demo", HELLO)
        return "".join(texts) + str(again["message"]["content"])

    threads = [asyncio.to_thread(lambda: asyncio.run(ask())) for _ in range(all_streams_began.parties)]
    assert await asyncio.gather(*threads) == ["HelloHello"] * len(threads)


async def test_found_backends_are_logged_once(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sollold.client")
    async with HybridRouter(node=await serve(parts(ScriptedService(*ANSWER)))) as router:
        await asyncio.gather(*(router.route_request("demo", HELLO) for _ in range(5)))
    assert len([line for line in caplog.messages if "RPC backends found" in line]) == 1
