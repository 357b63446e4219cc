"""A request that crashes an engine is not retried and is refused for some time."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from sollold.cluster.gossip.record import Backend
from sollold.cluster.net.http_connection import HttpConnection
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.exit_reason import KILLED
from sollold.errors import Fault, Refusal
from sollold.machine.device import Device, Kind
from sollold.models.gguf import demo_model
from sollold.serving.admission import AdmissionQueue
from sollold.serving.endpoint_server import EndpointState
from sollold.serving.engine_deaths import PERIOD, Quarantine
from sollold.serving.local_stream import LocalStream, crash_error
from sollold.serving.protocol import EngineRequest, ErrorKind, StreamError
from sollold.serving.request import Answer, Call, Engine, Waiting
from sollold.serving.watchdog import RequestProgress
from tests.api.direct_service import LlamaServer
from tests.doubles import until
from tests.serving.cluster_double import Cluster, Node, ask, text_of
from tests.serving.reciter import TEXT, Reciter


async def fetch(node: Node, *args: Any, **more: Any) -> list[dict[str, Any]]:
    answer: Answer = await node.serving.open(ask(*args, **more), lambda _: None)
    return [json.loads(event) async for event in answer.events]


async def three_nodes(
    cluster: Cluster, reason: str = "it was terminated by SIGSEGV"
) -> tuple[Node, Reciter, Reciter]:
    """Node a, which receives requests; b and c have an engine each, which crashes on ``deadly``."""
    a, b, c = [await cluster.node(name) for name in "abc"]
    first, second = await cluster.reciter(), await cluster.reciter()
    for node, id, reciter in ((b, "d1", first), (c, "d2", second)):
        node.engines.serve(id, reciter, slots=8)
        reciter.poison = "deadly"

        def crash(node: Node = node, id: str = id) -> None:
            # The exit is noticed shortly after the connection breaks.
            asyncio.get_running_loop().call_later(0.05, node.engines.crash, id, reason)

        reciter.on_death = crash
    return a, first, second


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", ["a", "b", "c"])
async def test_a_request_that_crashes_an_engine_is_not_retried(
    cluster: Cluster, stream: bool, asked: str
) -> None:
    await three_nodes(cluster)
    node = cluster.nodes["abc".index(asked)]
    first, second = cluster.reciters
    for id in ("first", "again"):
        with pytest.raises(Refusal) as refused:
            await fetch(node, stream=stream, id=id, grammar="deadly")
        assert (refused.value.fault, refused.value.status) == (Fault.BAD_REQUEST, 422)
        assert "crashed" in refused.value.message
    assert first.deaths + second.deaths == 1
    assert text_of(await fetch(node, id="other")) == TEXT


async def test_a_request_that_waits_is_refused_when_an_equal_one_crashes_an_engine(cluster: Cluster) -> None:
    a, b, c = [await cluster.node(name) for name in "abc"]
    first, second = await cluster.reciter(), await cluster.reciter()
    b.engines.serve("d1", first, slots=1)
    first.poison = "deadly"
    first.on_death = lambda: b.engines.crash("d1")
    first.fuse.clear()
    deadly = asyncio.create_task(fetch(a, id="deadly", grammar="deadly"))
    await until(lambda: first.requests)
    c.engines.serve("d2", second, slots=1)
    second.gate.clear()
    busy = asyncio.create_task(fetch(a, id="busy"))
    await until(lambda: second.requests)
    waitings: list[Waiting] = []
    equal = asyncio.create_task(a.serving.open(ask(id="equal", grammar="deadly"), waitings.append))
    await until(lambda: any(waiting.position for waiting in waitings))
    first.fuse.set()
    for task in (deadly, equal):
        with pytest.raises(Refusal) as refused:
            await asyncio.wait_for(task, 10)
        assert refused.value.status == 422
    second.gate.set()
    assert text_of(await busy) == TEXT
    assert len(second.requests) == 1


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_token_count_that_crashes_an_engine_is_not_retried(cluster: Cluster, asked: str) -> None:
    await three_nodes(cluster)
    first, second = cluster.reciters
    call = Call("/tokenize", {"content": "deadly"})
    with pytest.raises(Refusal) as refused:
        await fetch(cluster.nodes["abc".index(asked)], stream=False, calls={Engine.LLAMA: call})
    assert refused.value.status == 422
    assert first.deaths + second.deaths == 1


@pytest.mark.parametrize(
    ("paths", "suspects"),
    [
        (("/v1/chat/completions", "/v1/chat/completions", "/tokenize"), {0, 1}),
        (("/tokenize", "/tokenize"), {0, 1}),
        (("answered", "/tokenize"), set()),
        (("answered", "/v1/chat/completions"), {1}),
        (("/v1/chat/completions", "connecting"), {0}),
        (("/v1/chat/completions", "suspect"), {1}),
    ],
)
async def test_the_suspects_of_a_crash_are_the_requests_without_an_answer(
    paths: tuple[str, ...], suspects: set[int]
) -> None:
    """``answered`` has been answered in part, ``connecting`` was admitted after the crash, ``suspect`` was
    in an engine that crashed before."""
    queue = AdmissionQueue(4, 4)
    state = EndpointState("d", cast(Any, None), queue)
    streams = []
    for path in paths:
        request = EngineRequest(
            "r", "d", path, b"{}", bypass_queue=path == "/tokenize", suspect=path == "suspect"
        )
        stream = LocalStream(
            request, queue, cast(Any, None), cast(Any, None), stall=0.0, speed=0.0,
            on_speed=lambda stream, figures: None,
            on_end=lambda stream: None,
            suspects=state.suspects,
        )  # fmt: skip
        stream.progress = RequestProgress(0.0, 0.0, 0.0)
        stream.progress.began = path == "answered"
        if path != "connecting":
            stream._connection = HttpConnection("engine")
        streams.append(stream)
    state.streams = set(streams)
    assert {streams.index(stream) for stream in state.suspects()} == suspects
    for stream in streams:
        error = crash_error(StreamError(ErrorKind.ENGINE, "it crashed"), stream, state.suspects())
        found = streams.index(stream) in suspects
        assert (error.crashed, error.suspect) == (found and len(suspects) == 1, found and len(suspects) > 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("deadly_first", [True, False])
async def test_of_several_requests_only_the_cause_of_a_crash_is_refused(
    cluster: Cluster, deadly_first: bool, stream: bool
) -> None:
    """They are tried again one at a time, the likeliest cause last: if the others are answered, it is refused
    without a second crash. If another one is the cause, it crashes one more engine at most."""
    a, first, second = await three_nodes(cluster)
    d, third = await cluster.node("d"), await cluster.reciter()
    for reciter in (first, second):
        reciter.gate.clear()
        reciter.fuse.clear()
    tasks: list[asyncio.Task[list[dict[str, Any]]]] = []
    for n in range(6):
        more = {"grammar": "deadly"} if n == (0 if deadly_first else 5) else {}
        tasks.append(asyncio.create_task(fetch(a, stream=stream, id=f"r{n}", **more)))
        await until(lambda: len(first.requests) + len(second.requests) == len(tasks))
    d.engines.serve("d3", third, slots=8)
    for reciter in (first, second):
        reciter.fuse.set()
    # None of the others is answered before the crash.
    reciters = (first, second, third)
    await until(lambda: sum(len(reciter.requests) for reciter in reciters) > len(tasks))
    for reciter in (first, second):
        reciter.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refusal = results.pop(0 if deadly_first else 5)
    assert isinstance(refusal, Refusal) and refusal.status == 422
    for result in results:
        assert not isinstance(result, BaseException), result
        assert stream is False or text_of(result) == TEXT
    assert sum(reciter.deaths > 0 for reciter in reciters) == (2 if deadly_first else 1)


async def test_a_crash_without_a_cause_among_its_requests_blames_none_whose_caller_has_left(
    cluster: Cluster,
) -> None:
    """The likeliest cause is tried, too, if another suspect was never answered."""
    a, first, second = await three_nodes(cluster)
    cluster.nodes[2].view.update_me(endpoints=())
    first.gate.clear()
    tasks = []
    for n in range(2):
        tasks.append(asyncio.create_task(fetch(a, id=f"r{n}")))
        await until(lambda: len(first.requests) == len(tasks))
    tasks[0].cancel()
    cluster.nodes[1].engines.crash("d1", "it was terminated by SIGSEGV")
    first.gate.set()
    cluster.nodes[2].engines.serve("d3", second, slots=8)
    assert text_of(await tasks[1]) == TEXT


@pytest.mark.parametrize("stream", [True, False])
async def test_requests_of_a_crashed_runner_are_not_all_blamed(cluster: Cluster, stream: bool) -> None:
    """An Ollama reports the crash of its runner to all requests in it."""
    a, engine = await cluster.node("a"), await cluster.reciter()
    a.engines.serve("ollama:m", engine, backend=Backend.OLLAMA, loaded=True, slots=4)
    device = Device("CPU", Kind.CPU, "cpu", 100, 100, 100, 0, 100)
    a.view.update_me(devices=(device,))
    engine.status, engine.error = 500, CRASH
    engine.error_gate.clear()
    tasks = [
        asyncio.create_task(fetch(a, "ollama", stream=stream, id=f"r{n}", options={"top_k": n + 1}))
        for n in range(3)
    ]
    await until(lambda: len(engine.requests) == 3)
    engine.status = 200
    engine.error_gate.set()
    await asyncio.gather(*tasks)
    assert len(engine.requests) == 6


async def test_a_crash_for_lack_of_memory_is_not_blamed_on_the_request(cluster: Cluster) -> None:
    a, first, second = await three_nodes(cluster, reason="it ran out of memory (CUDA error: out of memory)")
    second.poison = first.poison
    first.on_death, second.poison = first.on_death, ""
    node_c = cluster.nodes[2].view
    node_c.update_me(endpoints=tuple(e for e in node_c.me.endpoints if e.id != "d2"))
    asking = asyncio.create_task(fetch(a, prompt_note="deadly"))
    await until(lambda: first.deaths == 1)
    cluster.nodes[2].engines.serve("d3", second)
    assert text_of(await asking) == TEXT


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_for_which_every_engine_runs_out_of_memory_ends_with_a_message_about_memory(
    cluster: Cluster, stream: bool
) -> None:
    a, *nodes = [await cluster.node(name) for name in "abcdef"]
    reciters = [await cluster.reciter() for _ in nodes]
    for index, (node, reciter) in enumerate(zip(nodes, reciters, strict=True)):
        node.engines.serve(f"d{index}", reciter, slots=8)
        reciter.poison = "deadly"

        def kill(node: Node = node, id: str = f"d{index}") -> None:
            asyncio.get_running_loop().call_later(0.05, node.engines.end, id, KILLED)

        reciter.on_death = kill
    for deaths in (4, 5):
        with pytest.raises(Refusal, match=r"killed.* more memory than these engines have") as refused:
            await asyncio.wait_for(fetch(a, stream=stream, prompt_note="deadly"), 10)
        assert refused.value.final
        # The same request again ends one more engine only.
        assert sum(reciter.deaths for reciter in reciters) == deaths


CRASH = "llama runner process has terminated: signal: segmentation fault (core dumped)"


@pytest.mark.parametrize(
    ("error", "loaded", "asked"),
    [
        (CRASH, True, 1),
        (CRASH, False, 2),
        ("llama runner process has terminated: cudaMalloc failed: out of memory", True, 2),
        (
            "llama runner process has terminated: signal: aborted (core dumped) CUDA error: out of memory",
            True,
            2,
        ),
    ],
)
async def test_a_request_that_crashes_an_ollama_runner_is_not_retried(
    cluster: Cluster, error: str, loaded: bool, asked: int
) -> None:
    a, b = await cluster.node("a"), await cluster.node("b")
    first, second = await cluster.reciter(), await cluster.reciter()
    a.engines.serve("ollama:m", first, backend=Backend.OLLAMA, loaded=loaded)
    b.engines.serve("ollama:n", second, backend=Backend.OLLAMA, loaded=loaded)
    a.names.size = 0
    device = Device("CPU", Kind.CPU, "cpu", 100, 100, 100, 0, 100)
    for node in (a, b):
        node.view.update_me(devices=(device,))
    for reciter in (first, second):
        reciter.status, reciter.error = 500, error
    with pytest.raises(Refusal) as refused:
        await fetch(a, "ollama")
    assert len(first.requests) + len(second.requests) == asked
    assert refused.value.status == (422 if asked == 1 else 500)


def test_a_crashing_request_is_refused_for_a_period() -> None:
    quarantine = Quarantine()
    quarantine.check(ask(), 0.0)
    quarantine.add(ask(grammar="deadly"), 0.0)
    quarantine.check(ask(), 1.0)
    for again in (ask(grammar="deadly", id="other"), ask(grammar="deadly", user="me")):
        with pytest.raises(Refusal, match="refused for 9 min"):
            quarantine.check(again, 60.0)
    quarantine.check(ask(grammar="deadly"), PERIOD)


def test_the_same_prompt_with_other_options_is_not_refused() -> None:
    """An option crashed the engine, such as a num_thread above the machine's."""
    quarantine = Quarantine()
    quarantine.add(ask("ollama", options={"num_thread": 100_000, "seed": 1}), 0.0)
    for options in ({}, None, {"num_thread": 4}):
        quarantine.check(ask("ollama", options=options), 1.0)
    with pytest.raises(Refusal, match="refused for 9 min"):
        quarantine.check(ask("ollama", options={"num_thread": 100_000, "seed": 2}), 60.0)


def test_the_number_of_remembered_requests_is_limited() -> None:
    quarantine = Quarantine()
    for n in range(1000):
        quarantine.add(ask(grammar=str(n)), 0.0)
    assert len(quarantine._until) <= 256
    with pytest.raises(Refusal):
        quarantine.check(ask(grammar="999"), 1.0)


@pytest.mark.llama
async def test_a_grammar_that_crashes_llama_server_reaches_one_of_two_servers(
    cluster: Cluster, llama: Llama, tmp_path: Path
) -> None:
    demo_model.write(tmp_path / "demo.gguf")
    a, b, c = [await cluster.node(name) for name in "abc"]
    with LlamaServer(llama.server, tmp_path / "demo.gguf") as first:
        with LlamaServer(llama.server, tmp_path / "demo.gguf") as second:
            b.engines.serve("d1", first, slots=2)
            c.engines.serve("d2", second, slots=2)

            async def watch(node: Node, id: str, server: LlamaServer) -> None:
                await until(lambda: server.exit_code is not None, 60)
                if server.exit_code in (-signal.SIGSEGV, -signal.SIGABRT):
                    node.engines.crash(id)

            watching = [
                asyncio.create_task(watch(b, "d1", first)),
                asyncio.create_task(watch(c, "d2", second)),
            ]
            grammar = "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000
            for id in ("first", "again"):
                with pytest.raises(Refusal) as refused:
                    await fetch(a, "native", id=id, grammar=grammar)
                assert refused.value.status == 422
            assert [first.exit_code, second.exit_code].count(None) == 1
            assert text_of(await fetch(a, "native", id="good", n_predict=20))
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
