"""Streams continue exactly after their engine or node dies."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend, State
from sollold.cluster.net.http_connection import HttpConnection
from sollold.cluster.net.pour import pulled
from sollold.engines.llamacpp.participants import Work
from sollold.errors import Fault, Refusal
from sollold.serving import attempts, dispatch, peer_handler, recovery
from sollold.serving.candidate import EndpointQuery
from sollold.serving.drain import drain
from sollold.serving.local_stream import LocalStream
from sollold.serving.protocol import EngineRequest
from sollold.serving.request import Answer, Call, Engine, Waiting
from sollold.settings.schema import ServingSettings
from tests.doubles import until
from tests.serving.cluster_double import MODEL, Cluster, Node, ask, text_of
from tests.serving.reciter import TEXT, WORDS, Reciter

FORMS = ["chat", "text", "native", "ollama", "generate"]


async def read(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(event) async for event in answer.events]


async def three_nodes(cluster: Cluster, form: str = "chat") -> tuple[Node, Reciter, Reciter]:
    """Node a, which receives the request; b and c have an endpoint each."""
    a, b, c = [await cluster.node(name) for name in "abc"]
    engine_b, engine_c = await cluster.reciter(), await cluster.reciter()
    backend = Backend.OLLAMA if form in ("ollama", "generate") else Backend.LOCAL
    # With fewer slots, the second endpoint is the second choice.
    b.engines.serve("d1", engine_b, slots=8, backend=backend)
    c.engines.serve("d2", engine_c, slots=1, backend=backend, active=1)
    return a, engine_b, engine_c


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11, 50, 199, 200, 201])
async def test_an_interrupted_stream_equals_the_uninterrupted_one(
    cluster: Cluster, form: str, cut: int
) -> None:
    a, engine_b, engine_c = await three_nodes(cluster, form)
    whole = [json.loads(e) async for e in (await a.serving.open(ask(form, id="w"), lambda _: None)).events]
    engine_b.die_after = engine_c.die_after = None
    engine_b.die_after = cut
    answer = await a.serving.open(ask(form), lambda _: None)
    events = await read(answer)
    assert text_of(events) == TEXT == text_of(whole)
    assert len(events) == len(whole)
    if engine_b.die_after is None and cut <= 200:
        assert answer.routing.resumed == 1
        assert answer.routing.gap_ms > 0
        assert answer.routing.node == "host-c" or cut == 0
    for old, new in zip(whole, events, strict=True):
        assert old.keys() == new.keys()
    if form in ("chat", "text"):
        assert len({event["id"] for event in events}) == 1
    if form == "chat":
        roles = [e for e in events if e["choices"] and "role" in e["choices"][0]["delta"]]
        assert len(roles) == 1
    if form in ("chat", "text"):
        assert events[-1]["usage"] == whole[-1]["usage"]
    if form == "native":
        assert events[-1]["tokens_predicted"] == len(WORDS)
    if form in ("ollama", "generate"):
        assert events[-1]["eval_count"] == len(WORDS)
        assert events[-1]["done"] is True


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [3, 7, 10])
async def test_the_token_limit_holds_across_an_interruption(cluster: Cluster, form: str, cut: int) -> None:
    a, engine_b, _ = await three_nodes(cluster, form)
    engine_b.die_after = cut
    limit: dict[str, Any] = {"max_tokens": 10}
    if form in ("ollama", "generate"):
        limit = {"options": {"num_predict": 10}}
    answer = await a.serving.open(ask(form, **limit), lambda _: None)
    events = await read(answer)
    assert text_of(events) == "".join(WORDS[:10])
    last = json.dumps(events[-2:])
    assert "length" in last or "limit" in last


async def test_repeated_engine_failures(cluster: Cluster) -> None:
    a, engine_b, engine_c = await three_nodes(cluster)
    engine_b.die_after, engine_c.die_after = 20, 30
    answer = await a.serving.open(ask(), lambda _: None)
    got = []
    async for event in answer.events:
        got.append(json.loads(event))
        if len(got) == 70:
            engine_b.die_after = engine_c.die_after = 10
    assert text_of(got) == TEXT
    assert answer.routing.resumed >= 2
    assert got[-1]["usage"]["completion_tokens"] == len(WORDS)


async def test_a_non_streamed_request_is_repeated(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.gate.clear()
    asking = asyncio.create_task(a.serving.open(ask(stream=False), lambda _: None))
    await until(lambda: engine_b.running == 1)
    await engine_b.stop()
    answer = await asking
    assert text_of(await read(answer)) == TEXT


async def test_a_node_failure_after_the_complete_answer_is_harmless(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, engine_b, engine_c = await three_nodes(cluster)

    async def dying(caller: peer_handler.PeerCaller) -> None:
        # Everything but the end of the HTTP response has been sent.
        await asyncio.sleep(0.05)
        caller._writer.abort()

    monkeypatch.setattr(peer_handler.PeerCaller, "drain", dying)
    answer = await a.serving.open(ask(stream=False), lambda _: None)
    assert text_of(await read(answer)) == TEXT
    assert answer.routing.resumed == 0
    assert (len(engine_b.requests), len(engine_c.requests)) == (1, 0)


async def test_a_non_streamed_request_reports_the_length_of_the_interruption(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.cut_whole = True
    answer = await a.serving.open(ask(stream=False), lambda _: None)
    assert text_of(await read(answer)) == TEXT
    assert answer.routing.resumed == 1 and answer.routing.gap_ms > 0


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_retries_of_an_embedding_request_are_limited(cluster: Cluster, asked: str) -> None:
    nodes = {name: await cluster.node(name) for name in "ab"}
    reciter = await cluster.reciter()
    nodes["b"].engines.serve("d1", reciter, embedding=True)

    async def loaded_again() -> None:
        await asyncio.sleep(0.05)

    for node in nodes.values():
        node.loader.load = loaded_again
    calls = {Engine.LLAMA: Call("/v1/embeddings", {"input": ["deadly"]})}
    deadly = ask(calls=calls, stream=False, embedding=True)
    with pytest.raises(Refusal) as refused:
        await nodes[asked].serving.open(deadly, lambda _: None)
    assert (
        refused.value.fault is Fault.INTERRUPTED
        and "3 engines failed one after another" in refused.value.message
    )
    assert len(reciter.requests) == 3


async def test_a_stream_waits_for_its_model_to_be_loaded_again(cluster: Cluster) -> None:
    a = await cluster.node("a")
    engine_b, engine_c = await cluster.reciter(), await cluster.reciter()
    a.engines.serve("d1", engine_b)
    engine_b.die_after = 40
    engine_b.pause = 0.001
    waits: list[Waiting] = []
    answer = await a.serving.open(ask(), waits.append)
    events = [json.loads(await anext(answer.events)) for _ in range(40)]
    going_on = asyncio.create_task(read(answer))
    await asyncio.sleep(0)
    await engine_b.stop()
    a.engines.drop("d1")
    await until(lambda: a.loader.loads > 0)
    assert not going_on.done()
    assert any(wait.stage == "recovering" for wait in waits)
    a.engines.serve("d2", engine_c)
    events += await going_on
    assert text_of(events) == TEXT


async def test_a_stream_waits_beyond_the_limit_while_the_load_progresses(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(recover_limit=1.0)
    a = await cluster.node("a")
    engine_b, engine_c = await cluster.reciter(), await cluster.reciter()
    a.engines.serve("d1", engine_b)
    engine_b.die_after = 40
    a.loader.forward = True

    async def load() -> None:
        """Takes longer than the limit in total, so that the leader is asked several times."""
        await asyncio.sleep(0.3)
        if a.loader.loads == 4:
            a.engines.serve("d2", engine_c)

    a.loader.load = load
    answer = await a.serving.open(ask("native"), lambda _: None)
    events = [json.loads(await anext(answer.events)) for _ in range(40)]
    a.engines.drop("d1")
    events += await read(answer)
    assert text_of(events) == TEXT
    assert a.loader.loads == 4


@pytest.mark.parametrize("freed", [True, False])
async def test_a_full_queue_does_not_end_a_begun_answer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    cluster.settings = ServingSettings(recover_limit=5.0 if freed else 0.5, queue=1)
    a, engine_b, engine_c = await three_nodes(cluster)
    c = cluster.nodes[2]
    engine_c.gate.clear()
    streams = [
        c.server.stream(EngineRequest(f"c{n}", "d2", "/completion", b'{"prompt": "Say: "}')) for n in range(2)
    ]
    await streams[0].open(lambda _: None)
    second = asyncio.create_task(streams[1].open(lambda _: None))
    await until(lambda: c.engines.inside == 2)
    asked = 0
    take = c.server.stream

    def counted(request: EngineRequest) -> LocalStream:
        nonlocal asked
        asked += request.path == "/v1/chat/completions"
        return take(request)

    monkeypatch.setattr(c.server._peer_requests, "_begin", counted)
    engine_b.die_after = 20
    answer = await a.serving.open(ask(), lambda _: None)
    cluster.nodes[1].engines.drop("d1")
    reading = asyncio.create_task(read(answer))
    await until(lambda: asked > 1)
    if freed:
        second.cancel()
        await streams[0].close()
        engine_c.gate.set()
        assert text_of(await reading) == TEXT
    else:
        with pytest.raises(Refusal) as full:
            await reading
        assert (
            full.value.fault is Fault.INTERRUPTED
            and "requests already wait for this model" in full.value.message
        )
        second.cancel()
        await streams[0].close()
    await asyncio.gather(second, return_exceptions=True)
    await until(lambda: c.server.under_way == 0)


async def test_a_stream_ends_with_an_error_if_its_model_can_not_be_loaded(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(recover_limit=0.5)
    a = await cluster.node("a")
    engine_b = await cluster.reciter()
    a.engines.serve("d1", engine_b)
    engine_b.die_after = 5

    async def never() -> None:
        raise Refusal(Fault.TOO_BIG, "needs 9 GiB, there are 3")

    a.loader.load = never
    answer = await a.serving.open(ask(), lambda _: None)
    got = []
    with pytest.raises(Refusal) as refusal:
        async for event in answer.events:
            got.append(event)
            a.engines.drop("d1") if a.engines.urls else None
    assert refusal.value.fault is Fault.INTERRUPTED
    assert "needs 9 GiB" in refusal.value.message
    assert a.serving.under_way == 0


@pytest.mark.parametrize("cut", [0, 5])
async def test_a_request_waits_for_memory_that_another_program_took(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    monkeypatch.setattr(dispatch, "_MEMORY_CHECK", 0.05)
    a = await cluster.node("a")
    engine_b, engine_c = await cluster.reciter(), await cluster.reciter()
    a.engines.serve("d1", engine_b)
    engine_b.die_after = cut
    waits: list[Waiting] = []

    async def memory_taken() -> None:
        if a.loader.loads < 4:
            raise Refusal(Fault.TOO_BIG, "needs 9 GiB, there are 3")
        a.engines.serve("d2", engine_c)

    a.loader.load = memory_taken
    opening = asyncio.create_task(a.serving.open(ask(), waits.append))
    if not cut:
        await until(lambda: a.engines.failed or engine_b.requests)
        a.engines.drop("d1")
    answer = await opening
    if cut:
        a.engines.drop("d1")
    assert text_of(await read(answer)) == TEXT
    assert a.loader.loads == 4
    assert caplog.text.count("no memory to load") == 1 and "needs 9 GiB" in caplog.text
    assert any(wait.message == "needs 9 GiB, there are 3" for wait in waits)


async def test_a_model_that_was_not_loaded_before_does_not_wait_for_memory(cluster: Cluster) -> None:
    a = await cluster.node("a")

    async def never() -> None:
        raise Refusal(Fault.TOO_BIG, "needs 9 GiB, there are 3")

    a.loader.load = never
    with pytest.raises(Refusal, match="needs 9 GiB"):
        await a.serving.open(ask(), lambda _: None)
    assert a.loader.loads == 1


@pytest.mark.parametrize("more", [{"logprobs": True}, {"n": 2}])
async def test_a_stream_that_cant_be_continued_ends_with_a_clear_error(
    cluster: Cluster, more: dict[str, Any]
) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.die_after = 9
    answer = await a.serving.open(ask(**more), lambda _: None)
    with pytest.raises(Refusal) as refusal:
        await read(answer)
    assert refusal.value.fault is Fault.INTERRUPTED
    assert "can't be continued exactly" in refusal.value.message
    assert a.serving.under_way == 0


async def test_a_gathered_answer_that_cant_be_continued_is_restarted(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.die_after = 9
    answer = await a.serving.open(ask(n=2, gathered=True), lambda _: None)
    events = [event async for event in answer.events]
    anew = events.index(b"")
    assert anew == 9
    assert text_of([json.loads(event) for event in events[anew + 1 :]]) == TEXT
    assert answer.routing.resumed == 1 and answer.routing.gap_ms > 0


async def test_a_stream_leaves_a_dead_node_immediately(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = 30
    answer = await a.serving.open(ask(), lambda _: None)
    events = [json.loads(await anext(answer.events)) for _ in range(30)]
    reading = asyncio.create_task(read(answer))
    await until(lambda: engine_b.hang_after is None)
    cluster.world.dead.add("b")
    cluster.world.changed()
    events += await reading
    assert text_of(events) == TEXT
    assert answer.routing.node == "host-c"


async def test_a_hung_engine_is_distinguished_from_a_slow_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.1)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=1.5)
    a, engine_b, _ = await three_nodes(cluster)
    b = cluster.nodes[1]
    engine_b.hang_after = 30

    async def work() -> None:
        while not b.engines.failed and engine_b.work < 400:
            engine_b.work += 1
            await asyncio.sleep(0.01)

    # The engine counts as slow, not hung, while its slots report work.
    working = asyncio.create_task(work())
    answer = await a.serving.open(ask(), lambda _: None)
    events = await read(answer)
    await working
    assert engine_b.work == 400
    assert text_of(events) == TEXT
    assert answer.routing.resumed == 1
    assert b.engines.failed[0][0] == "d1"
    assert "no token" in b.engines.failed[0][1]


async def test_time_in_which_the_daemon_was_suspended_does_not_count_as_a_hang(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.1)
    monkeypatch.setattr("sollold.serving.watchdog.STOOD_STILL", 2.0)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=2.0)
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = 30
    answer = await a.serving.open(ask(), lambda _: None)
    reading = asyncio.create_task(read(answer))
    await until(lambda: engine_b.hang_after is None)
    time.sleep(2.5)  # noqa: ASYNC251
    await asyncio.sleep(0.5)
    failed = cluster.nodes[1].engines.failed
    assert not failed and "did not run for" in caplog.text
    assert text_of(await reading) == TEXT
    assert "no token" in failed[0][1]


@pytest.mark.parametrize("after", [0, 30])
async def test_a_hung_engine_that_sends_pings_is_detected(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.1)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=0.5)
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = after
    engine_b.pings = True
    async with asyncio.timeout(8):
        answer = await a.serving.open(ask(), lambda _: None)
        assert text_of(await read(answer)) == TEXT
    assert "no token" in cluster.nodes[1].engines.failed[0][1]


async def test_a_failed_check_does_not_end_the_checks(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.1)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=0.5)
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = 30
    failures: list[str] = []

    def fail_once(endpoint: str) -> None:
        if not failures:
            failures.append(endpoint)
            raise ZeroDivisionError

    monkeypatch.setattr(cluster.nodes[1].engines, "work", fail_once)
    async with asyncio.timeout(8):
        answer = await a.serving.open(ask(), lambda _: None)
        assert text_of(await read(answer)) == TEXT
    assert failures and "no token" in cluster.nodes[1].engines.failed[0][1]


@pytest.mark.parametrize("still", [0.0, -1.0])
async def test_without_a_limit_no_engine_counts_as_idle(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, still: float
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.05)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=600, still=still)
    a, engine_b, _ = await three_nodes(cluster)
    b = cluster.nodes[1]
    b.engines.done = Work(0, 0)
    engine_b.pause = 0.02
    answer = await a.serving.open(ask(), lambda _: None)
    assert text_of(await read(answer)) == TEXT
    assert not b.engines.failed


async def test_a_loading_ollama_has_a_longer_time_limit(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(stall=100.0)
    b = await cluster.node("b")
    engine_b = await cluster.reciter()
    body = json.dumps(ask("ollama").calls[Engine.OLLAMA].body).encode()
    for id, loaded, patience in (("ollama:m", False, 1200.0), ("ollama:n", True, 300.0)):
        b.engines.serve(id, engine_b, backend=Backend.OLLAMA, loaded=loaded)
        stream = b.server.stream(EngineRequest(id, id, "/api/chat", body))
        await stream.open(lambda _: None)
        assert stream.progress is not None and stream.progress.limit == patience
        assert await anext(pulled(stream.pour))
        assert stream.progress.limit == 100.0
        await stream.close()


async def test_an_idle_engine_is_left_before_the_stall_limit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.05)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=600, still=0.5)
    a, engine_b, _ = await three_nodes(cluster)
    b = cluster.nodes[1]
    engine_b.hang_after = 30
    b.engines.done = Work(0, 0)

    async def work() -> None:
        """Its processes use CPU, then only its tunnels are used, then neither."""
        for n in range(30):
            b.engines.done = Work(n * 100, 0)
            await asyncio.sleep(0.04)
        for n in range(30):
            b.engines.done = Work(3000, n)
            await asyncio.sleep(0.04)

    answer = await a.serving.open(ask(), lambda _: None)
    working = asyncio.create_task(work())
    events = await read(answer)
    assert working.done()
    assert text_of(events) == TEXT
    assert "none of its processes used any CPU" in b.engines.failed[0][1]


async def test_a_draining_node_moves_its_streams_at_the_limit(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(recover_limit=5.0, drain_limit=0.2)
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = 30
    answer = await a.serving.open(ask(), lambda _: None)
    events = [json.loads(await anext(answer.events)) for _ in range(30)]
    b = cluster.nodes[1]
    draining = asyncio.create_task(drain(b.view, b.server, b.serving, cluster.settings, "node b is leaving"))
    events += await read(answer)
    await draining
    assert text_of(events) == TEXT
    assert answer.routing.node == "host-c"
    assert b.server.under_way == 0


async def test_a_caller_may_cancel_during_recovery(cluster: Cluster) -> None:
    a = await cluster.node("a")
    engine_b = await cluster.reciter()
    a.engines.serve("d1", engine_b)
    engine_b.die_after = 5
    answer = await a.serving.open(ask(), lambda _: None)
    reading = asyncio.create_task(read(answer))
    await until(lambda: engine_b.die_after is None)
    a.engines.drop("d1")
    await until(lambda: a.loader.loads == 1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: a.serving.under_way == 0 and a.server.under_way == 0)


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_slow_reader_is_not_mistaken_for_a_hung_engine(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.05)
    cluster.settings = ServingSettings(recover_limit=5.0, stall=0.2)
    await three_nodes(cluster)
    a, b, _ = cluster.nodes
    answer = await (a if asked == "a" else b).serving.open(ask(), lambda _: None)
    events = [json.loads(await anext(answer.events))]
    await asyncio.sleep(0.8)
    events += await read(answer)
    assert text_of(events) == TEXT
    assert b.engines.failed == []


async def test_a_stopped_reader_releases_its_slot(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.05)
    monkeypatch.setattr("sollold.serving.endpoint_server._UNREAD_SECONDS", 0.2)
    _, engine_b, _ = await three_nodes(cluster)
    engine_b.pause = 0.02
    b = cluster.nodes[1]
    answer = await b.serving.open(ask(), lambda _: None)
    events = [json.loads(await anext(answer.events))]
    await until(lambda: engine_b.running == 0 and engine_b.cancelled == 1)
    assert b.engines.failed == []
    # When the reader continues, the answer is resumed where it stopped.
    events += await read(answer)
    assert text_of(events) == TEXT
    assert answer.routing.resumed == 1


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_stopped_reader_does_not_block_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr("sollold.serving.endpoint_server.CHECK_EVERY", 0.05)
    monkeypatch.setattr("sollold.serving.endpoint_server._UNREAD_SECONDS", 0.2)
    a, b = await cluster.node("a"), await cluster.node("b")
    engine_b = await cluster.reciter()
    # More than all buffers on the path.
    engine_b.padding = 256 * 1024
    b.engines.serve("d1", engine_b, slots=1)
    node = a if asked == "a" else b
    stopped = await node.serving.open(ask(id="stopped"), lambda _: None)
    events = [json.loads(await anext(stopped.events))]
    async with asyncio.timeout(20):
        other_events = await read(await node.serving.open(ask(id="other"), lambda _: None))
        assert text_of(other_events) == TEXT
        # When the reader continues, the answer is resumed where it stopped.
        events += await read(stopped)
    assert text_of(events) == TEXT
    await until(lambda: b.server.under_way == 0 and b.engines.inside == 0)


async def test_an_engine_that_dies_during_an_error_response_releases_its_slot(cluster: Cluster) -> None:
    b = await cluster.node("b")
    engine_b = await cluster.reciter()
    engine_b.cut_error = True
    b.engines.serve("d1", engine_b, slots=1)
    async with asyncio.timeout(4):
        assert text_of(await read(await b.serving.open(ask(), lambda _: None))) == TEXT
    await until(lambda: b.server.under_way == 0 and b.engines.inside == 0)


async def test_a_request_aborted_as_it_begins_continues_elsewhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine_b, _ = await three_nodes(cluster)
    b = cluster.nodes[1]
    engine_b.hang_after = 3
    asked = HttpConnection.ask

    async def begun(*args: Any) -> int:
        status = await asked(*args)
        asyncio.get_running_loop().call_soon(b.server.abort_all, "the node is drained")
        return status

    monkeypatch.setattr(HttpConnection, "ask", begun)
    async with asyncio.timeout(4):
        answer = await b.serving.open(ask(), lambda _: None)
        monkeypatch.undo()
        assert text_of(await read(answer)) == TEXT
    await until(lambda: b.server.under_way == 0)


async def test_the_slot_of_a_vanished_node_is_released(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.hang_after = 20
    b = cluster.nodes[1]
    answer = await a.serving.open(ask(), lambda _: None)
    assert await anext(answer.events)
    cluster.world.dead.add("a")
    cluster.world.changed()
    await until(lambda: b.server.under_way == 0 and engine_b.cancelled == 1)
    await answer.close()


async def test_a_request_that_kills_engines_is_retried_three_times(cluster: Cluster) -> None:
    a, engine_b, engine_c = await three_nodes(cluster)
    engine_b.poison = engine_c.poison = "recite"
    with pytest.raises(Refusal) as refusal:
        await read(await a.serving.open(ask(), lambda _: None))
    assert refusal.value.fault is Fault.INTERRUPTED
    assert "one after another" in refusal.value.message
    assert engine_b.deaths + engine_c.deaths == 4


@pytest.mark.parametrize("crashed", [True, False])
async def test_a_non_streamed_request_is_repeated_unless_it_crashed_the_engine(
    cluster: Cluster, crashed: bool
) -> None:
    a = await cluster.node("a")
    engine_b = await cluster.reciter()
    a.engines.serve("d0", engine_b)
    engine_b.poison = "recite"
    began = 0

    def reload() -> None:
        """Report the engine's death and a new deployment."""
        nonlocal began
        if engine_b.deaths > began:
            began = engine_b.deaths
            if began == 6:
                engine_b.poison = ""
            old = a.view.me.endpoints[-1]
            a.view.update_me(endpoints=(replace(old, state=State.FAILED, crashed=crashed),))
            a.engines.serve(f"d{began}", engine_b)

    async def watch() -> None:
        while True:
            reload()
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    try:
        opening = a.serving.open(ask(stream=False), lambda _: None)
        if crashed:
            with pytest.raises(Refusal, match="an engine crashed"):
                await opening
            assert engine_b.deaths == 1
        else:
            assert text_of(await read(await opening)) == TEXT
            assert engine_b.deaths == 6
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_stream_continues_although_the_engine_does_not_count_its_tokens(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (attempts, recovery):
        monkeypatch.setattr(room, "BYPASS_LIMIT", 0.3)
    a, engine_b, engine_c = await three_nodes(cluster)
    engine_b.die_after, engine_c.deaf = 50, True
    events = await read(await a.serving.open(ask(), lambda _: None))
    assert text_of(events) == TEXT


async def test_a_load_only_request_to_an_unresponsive_engine_times_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "BYPASS_LIMIT", 0.3)
    a, engine_b, engine_c = await three_nodes(cluster)
    engine_b.deaf = engine_c.deaf = True
    with pytest.raises(Refusal, match="small request") as refusal:
        await a.serving.open(ask(load_only=True), lambda _: None)
    assert refusal.value.fault is Fault.TIMEOUT


async def test_an_unreachable_remote_engine_is_avoided(cluster: Cluster) -> None:
    a, b = await cluster.node("a"), await cluster.node("b")
    engine_b = await cluster.reciter()
    b.engines.serve("d1", engine_b)
    await engine_b.stop()
    opening = asyncio.create_task(a.serving.open(ask(), lambda _: None))
    wish, now = EndpointQuery(MODEL, frozenset((Engine.LLAMA,))), asyncio.get_running_loop().time
    assert a.router.candidates(a.view.live(), wish, now())
    await until(lambda: not a.router.candidates(a.view.live(), wish, now()))
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)


@pytest.mark.parametrize("form", ["chat", "text", "ollama", "generate"])
@pytest.mark.parametrize("asked", ["a", "b"])
async def test_an_ollama_that_ends_its_answer_cleanly_is_not_resumed(
    cluster: Cluster, form: str, asked: str
) -> None:
    a, engine_b, engine_c = await three_nodes(cluster, "ollama")
    engine_b.end_after = engine_c.end_after = 40
    (call,) = ask(form).calls.values()
    node = a if asked == "a" else cluster.nodes[1]
    answer = await node.serving.open(ask(form, calls={Engine.OLLAMA: call}), lambda _: None)
    events = await read(answer)
    assert len(engine_b.requests) + len(engine_c.requests) == 1 and answer.routing.resumed == 0
    text = text_of(events)
    assert TEXT.startswith(text) and text
    last = events[-1]
    if form in ("ollama", "generate"):
        assert (last["done"], last["done_reason"], last["model"]) == (True, "stop", "m")
        assert last["eval_count"] == 40
    else:
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["id"] == events[0]["id"] and last["object"].startswith(("chat", "text"))
    await until(lambda: all(node.server.under_way == 0 for node in cluster.nodes))


async def test_a_llama_server_that_ends_its_answer_early_is_resumed(cluster: Cluster) -> None:
    a, engine_b, _ = await three_nodes(cluster)
    engine_b.end_after = 40
    answer = await a.serving.open(ask(), lambda _: None)
    assert text_of(await read(answer)) == TEXT and answer.routing.resumed == 1


async def test_a_stream_whose_tool_call_can_not_be_parsed_continues_as_text(cluster: Cluster) -> None:
    a = await cluster.node("a")
    engine = await cluster.reciter()
    a.engines.serve("d1", engine, slots=1)
    engine.unparsed_after = 9
    answer = await a.serving.open(ask(tools=[{}], tool_choice="auto"), lambda _: None)
    async with asyncio.timeout(1):
        events = await read(answer)
    assert text_of(events) == TEXT
    assert events[-1]["usage"]["completion_tokens"] == len(WORDS)
    chats = [body for path, body, _ in engine.requests if path == "/v1/chat/completions"]
    assert [body["tool_choice"] for body in chats] == ["auto", "none"]


async def test_a_call_that_can_not_be_parsed_after_a_part_was_sent_is_a_clear_error(cluster: Cluster) -> None:
    a = await cluster.node("a")
    engine = await cluster.reciter()
    a.engines.serve("d1", engine, slots=1)
    engine.unparsed_after, engine.partial_call = 9, True
    answer = await a.serving.open(ask(tools=[{}], tool_choice="auto"), lambda _: None)
    with pytest.raises(Refusal, match="tool call can't be parsed") as refused:
        await read(answer)
    assert refused.value.fault is Fault.ENGINE
    # If nothing was delivered to the client yet, the answer starts over as text.
    answer = await a.serving.open(ask(tools=[{}], tool_choice="auto", gathered=True), lambda _: None)
    events = [event async for event in answer.events]
    restart = events.index(b"")
    assert text_of([json.loads(event) for event in events[restart + 1 :]]) == TEXT
    chats = [body for path, body, _ in engine.requests if path == "/v1/chat/completions"]
    assert [body["tool_choice"] for body in chats] == ["auto", "auto", "none"]


async def test_a_call_that_can_not_be_parsed_ends_an_answer_that_can_not_be_continued(
    cluster: Cluster,
) -> None:
    a = await cluster.node("a")
    engine = await cluster.reciter()
    a.engines.serve("d1", engine, slots=1)
    engine.unparsed_after = 9
    answer = await a.serving.open(ask(tools=[{}], logprobs=True), lambda _: None)
    with pytest.raises(Refusal, match="does not match the expected") as refused:
        await read(answer)
    assert refused.value.fault is Fault.ENGINE
