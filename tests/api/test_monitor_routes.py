"""Events, history, requests, health and Prometheus targets over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.http.inflight import InflightRequest, InflightRequests
from sollold.control.activity import Activity, RequestStats
from sollold.control.history import HistoryRequest, NodeHistory, bounded_request
from sollold.control.monitor import Monitor
from sollold.errors import Fault, Refusal
from sollold.machine.gpus import GpuLoad
from sollold.serving.request import Ask, Call, Engine
from tests.api.api_parts import (
    CHAT,
    PlainCluster,
    ScriptedService,
    chunk,
    monitor_of,
    parts,
    record,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.doubles import until

BETA = record("1" * 16, "beta", endpoints=())


@asynccontextmanager
async def watching(monitor: Monitor) -> AsyncIterator[None]:
    await monitor.start()
    try:
        yield
    finally:
        await monitor.close()


async def get(http: ClientSession, url: str) -> Any:
    async with http.get(url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json(content_type=None)


def read(monitor: Monitor) -> list[float]:
    points = monitor.history.read("", "", bounded_request(60, 1)).series["requests_per_second"]
    return [value for value in points if value == value]


async def events(http: ClientSession, url: str) -> list[dict[str, Any]]:
    async with http.get(url) as answer:
        assert answer.content_type == "text/event-stream"
        text = await answer.text()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


async def until_newer(monitor: Monitor, newest: int) -> None:
    """Wait for an event after the one with this id."""
    await until(lambda: monitor.events.newest > newest)


async def test_a_follower_gets_a_lost_node_immediately(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(), BETA)
    monitor = monitor_of(cluster)
    url = await serve(parts(cluster=cluster, monitor=monitor))
    async with watching(monitor), http.get(f"{url}/api/cluster/events?follow=1") as answer:
        await answer.content.readuntil(b"\n\n")
        began = time.monotonic()
        cluster.change(record())
        received = await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)
        assert time.monotonic() - began < 2
        assert b"event: node.lost" in received and b"beta stopped responding" in received
        cluster.change(record(), BETA)
        assert b"node.returned" in await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)
    listed = await events(http, f"{url}/api/cluster/events")
    assert [event["kind"] for event in listed] == ["node.lost", "node.returned"]
    first, second = (event["id"] for event in listed)
    assert [event["id"] for event in await events(http, f"{url}/api/cluster/events?last=1")] == [second]
    assert [event["id"] for event in await events(http, f"{url}/api/cluster/events?after={first}")] == [
        second
    ]
    async with http.get(f"{url}/api/cluster/events", headers={"Last-Event-ID": str(second)}) as answer:
        assert "data:" not in await answer.text()
    # An id from before the clock was set back is unknown: all events are sent.
    later = second + 10**9
    assert [event["id"] for event in await events(http, f"{url}/api/cluster/events?after={later}")] == [
        first,
        second,
    ]
    async with http.get(f"{url}/api/cluster/events", headers={"Last-Event-ID": str(later)}) as answer:
        assert "node.lost" in await answer.text()


async def test_a_follower_continues_after_a_restart_without_loss_or_repetition(
    serve: Serve, http: ClientSession
) -> None:
    cluster = PlainCluster(record(), BETA)
    seen = 0
    for kinds in (["node.lost"], ["node.joined", "node.lost"], ["node.joined"]):
        # Each run has other events, so positions in the log don't identify them.
        monitor = monitor_of(cluster)
        url = f"{await serve(parts(cluster=cluster, monitor=monitor))}/api/cluster/events"
        async with watching(monitor):
            for kind in kinds:
                cluster.change(*((record(),) if kind == "node.lost" else (record(), BETA)))
                await until_newer(monitor, monitor.events.newest)
            async with http.get(url, headers={"Last-Event-ID": str(seen)}) as answer:
                text = await answer.text()
            received = await events(http, f"{url}?after={seen}")
        ids = [event["id"] for event in received]
        assert [event["kind"] for event in received] == kinds
        assert [f"id: {id_}" for id_ in ids] == [line for line in text.splitlines() if line.startswith("id:")]
        assert ids == sorted(ids) and ids[0] > seen and ids[-1] < 2**53
        seen = ids[-1]


async def test_event_streams_are_limited_per_client(serve: Serve, http: ClientSession) -> None:
    url = f"{await serve(parts())}/api/cluster/events?follow=1"
    async with AsyncExitStack() as stack:
        for _ in range(16):
            answer = await stack.enter_async_context(http.get(url))
            assert answer.status == 200
        async with http.get(url) as answer:
            assert answer.status == 503 and "you already have 16 event streams open" in await answer.text()
    status = 0
    async with asyncio.timeout(20):
        while status != 200:  # until the server notices the disconnections
            async with http.get(url) as answer:
                status = answer.status
            await asyncio.sleep(0.02)


async def test_event_streams_end_when_the_monitor_closes(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    monitor = monitor_of(cluster)
    url = await serve(parts(cluster=cluster, monitor=monitor))
    await monitor.start()
    async with http.get(f"{url}/api/cluster/events?follow=1") as answer:
        await answer.content.readuntil(b"\n\n")
        await monitor.close()
        assert b"data:" not in await asyncio.wait_for(answer.content.read(), 5)


@pytest.mark.parametrize("query", ["last=x", "after=-1", "follow=1e3", "last=99999999999"])
async def test_invalid_numbers_in_the_query_are_refused(
    serve: Serve, http: ClientSession, query: str
) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/api/cluster/events?{query}") as answer:
        assert answer.status == 400 and query.split("=")[0] in await answer.text()


async def test_a_missing_node_is_shown_until_it_is_forgotten(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(), BETA)
    monitor = monitor_of(cluster)
    url = await serve(parts(cluster=cluster, monitor=monitor))
    async with watching(monitor):
        cluster.change(record())
        await until(monitor.offline)
        shown = await get(http, f"{url}/api/cluster")
        # Placements name the missing node.
        assert {"alpha", "beta"} == {
            share["node_name"] for deployment in shown["deployments"] for share in deployment["placed"]
        }
        (missing,) = shown["offline"]
        assert missing["name"] == "beta" and not missing["stopped"]
        assert abs(missing["since"] - time.time()) < 10
        assert missing["held"] == [
            {"model": "demo:latest", "device": "CUDA0", "first": 2, "last": 5, "bytes": 600}
        ]
        async with http.get(f"{url}/metrics") as answer:
            text = await answer.text()
        assert "sollold_nodes_missing 1.0" in text
        assert 'sollold_node_offline_timestamp_seconds{name="beta",reason="lost"}' in text
        targets = await get(http, f"{url}/api/cluster/prometheus-sd")
        assert [(target["targets"], target["labels"]["node"]) for target in targets] == [
            (["10.0.0.1:11435"], "alpha"),
            (["10.0.0.1:11435"], "beta"),
        ]
        async with http.post(f"{url}/api/cluster/forget", json={"node": "gamma"}) as answer:
            assert answer.status == 404 and "no offline node 'gamma'; offline are beta" in await answer.text()
        async with http.post(f"{url}/api/cluster/forget", json={"node": "beta"}) as answer:
            assert answer.status == 200
        assert (await get(http, f"{url}/api/cluster"))["offline"] == []


async def test_active_and_recent_requests(serve: Serve, http: ClientSession) -> None:
    gate = asyncio.Event()
    service = ScriptedService(chunk("a"), chunk("b"), gate, chunk(finish="stop"), usage_chunk(7, 20))
    services = parts(service)
    url = await serve(services)
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
        shown = await get(http, f"{url}/api/cluster/requests")
        assert [request["stage"] for request in shown["active"]] == ["answering"] and shown["recent"] == []
        gate.set()
        await answer.read()
    async with http.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
        await answer.read()
    service.refusal = Refusal(Fault.TOO_BIG, "3 GiB are missing")
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        assert answer.status == 507
    shown = await get(http, f"{url}/api/cluster/requests")
    assert shown["active"] == []
    refused, whole, streamed = shown["recent"]
    assert (streamed["model"], streamed["node"], streamed["tokens"], streamed["prompt_tokens"]) == (
        "demo:latest",
        "beta",
        20,
        7,
    )
    assert streamed["outcome"] == "ok" and 0 <= streamed["first_token_seconds"] <= streamed["seconds"]
    assert whole["path"] == "/v1/chat/completions" and whole["outcome"] == "ok"
    assert refused["outcome"] == "error" and refused["error"] == "3 GiB are missing"
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    labels = 'model="demo:latest",route="/api/chat"'
    assert f"sollold_generation_tokens_total{{{labels}}} 20.0" in text
    assert f"sollold_prompt_tokens_total{{{labels}}} 7.0" in text
    assert f"sollold_time_to_first_token_seconds_count{{{labels}}} 1.0" in text
    assert 'sollold_requests_total{model="demo:latest",outcome="error",route="/api/chat"} 1.0' in text


async def test_an_answer_in_one_piece_has_its_engines_times(serve: Serve, http: ClientSession) -> None:
    answer = {
        **chunk("the whole answer"),
        "timings": {"prompt_n": 7, "predicted_n": 20, "predicted_ms": 50.0},
    }
    services = parts(ScriptedService(0.1, answer))
    url = await serve(services)
    async with http.post(f"{url}/v1/chat/completions", json=CHAT) as response:
        await response.read()
    (request,) = (await get(http, f"{url}/api/cluster/requests"))["recent"]
    assert request["seconds"] - request["first_token_seconds"] == pytest.approx(0.05, abs=0.01)
    assert request["tokens_per_second"] == pytest.approx(19 / 0.05, rel=0.2)
    assert services.monitor.activity.tokens == 20 and services.monitor.activity.first_token_count == 1


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings", "/api/batch/embed"])
async def test_embeddings_are_counted(serve: Serve, http: ClientSession, path: str, engine: Engine) -> None:
    answers: dict[Engine, Any] = {
        Engine.LLAMA: {"data": [{"embedding": [1.0], "index": 0}], "usage": {"prompt_tokens": 4}},
        Engine.OLLAMA: {"embeddings": [[1.0]], "embedding": [1.0], "prompt_eval_count": 4},
    }
    services = parts(ScriptedService(answers[engine], engine=engine))
    url = await serve(services)
    body = {"model": "demo", "input": ["hi"], "prompt": "hi"}
    async with http.post(url + path, json=body) as answer:
        assert answer.status in (200, 202)
        await answer.read()
    await until(lambda: services.monitor.activity.finished)
    (request,) = (await get(http, f"{url}/api/cluster/requests"))["recent"]
    wanted = {"path": path, "outcome": "ok", "prompt_tokens": 4, "tokens": 0, "first_token_seconds": None}
    assert {name: request[name] for name in wanted} == wanted
    assert services.monitor.activity.tokens == 0, "nothing was generated"


async def test_counting_a_prompts_tokens_reads_no_prompt(serve: Serve, http: ClientSession) -> None:
    services = parts(ScriptedService({"input_tokens": 8}))
    url = await serve(services)
    async with http.post(f"{url}/v1/messages/count_tokens", json=CHAT) as answer:
        assert await answer.json() == {"input_tokens": 8}
    (request,) = services.monitor.activity.recent
    assert (request.outcome, request.prompt_tokens, request.tokens, request.first_token) == ("ok", 0, 0, -1.0)


async def test_a_client_that_disconnects_is_a_cancelled_request(serve: Serve, http: ClientSession) -> None:
    services = parts(ScriptedService(chunk("a"), asyncio.Event()))
    url = await serve(services)
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
    await until(lambda: services.monitor.activity.recent)
    recent = (await get(http, f"{url}/api/cluster/requests"))["recent"]
    assert recent[0]["outcome"] == "cancelled"


def test_disconnecting_after_the_whole_answer_is_no_cancellation() -> None:
    for ended, outcome in ((False, "cancelled"), (True, "ok")):
        live = InflightRequest(Ask("id", "demo", {}, stream=True), "/api/chat", Activity(), ended=ended)
        live.cancelled()
        assert live.outcome == outcome


def test_a_stream_that_ended_early_counts_an_estimate_of_its_prompt() -> None:
    """The engine has read it, but reports its length with the last events only."""
    requests = InflightRequests(Activity())
    call = Call("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 400}]})
    live = requests.begin(Ask("id", "demo", {Engine.LLAMA: call}, stream=True), "/api/chat")
    live.event(json.dumps(chunk("a")).encode())
    live.cancelled()
    record = requests.count(live)
    assert 400 < record.prompt_tokens < 600 and record.tokens == 1
    waiting = requests.begin(Ask("id", "demo", {Engine.LLAMA: call}, stream=True), "/api/chat")
    waiting.cancelled()
    assert requests.count(waiting).prompt_tokens == 0


def test_only_tokens_have_gaps() -> None:
    activity = Activity()
    requests = InflightRequests(activity)
    live = requests.begin(Ask("id", "demo", {}, stream=True), "/api/chat")
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}
    for event in (role, chunk("a"), chunk("b"), chunk("c"), chunk(finish="stop"), usage):
        live.event(json.dumps(event).encode())
    requests.count(live)
    (stats,) = activity.stats.values()
    assert sum(stats.inter_token.counts) == 2


async def test_histories_are_gathered_one_at_a_time(
    serve: Serve, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes megabytes from every node, and needs no key by default."""
    running, most = 0, 0

    async def histories(monitor: Monitor, span: HistoryRequest) -> list[NodeHistory]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return []

    monkeypatch.setattr(Monitor, "histories", histories)
    url = await serve(parts())
    spans = (60 + count for count in range(8))
    await asyncio.gather(*(get(http, f"{url}/api/cluster/history?seconds={span}") for span in spans))
    assert most == 1


async def test_equal_requests_for_the_history_share_one(
    serve: Serve, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that does not answer delays each by seconds."""
    begun, answered = 0, asyncio.Event()

    async def histories(monitor: Monitor, span: HistoryRequest) -> list[NodeHistory]:
        nonlocal begun
        begun += 1
        await answered.wait()
        return []

    monkeypatch.setattr(Monitor, "histories", histories)
    url = await serve(parts())
    asked = [asyncio.create_task(get(http, f"{url}/api/cluster/history")) for _ in range(8)]
    await until(lambda: begun == 1)
    asked[0].cancel()
    await get(http, f"{url}/health")
    answered.set()
    assert [found["nodes"] for found in await asyncio.gather(*asked[1:])] == [[]] * 7
    assert begun == 1
    await get(http, f"{url}/api/cluster/history")
    assert begun == 2


async def test_history_of_the_cluster(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(), BETA)
    monitor = monitor_of(cluster, gpus=lambda: [GpuLoad("CUDA0", 0.5, 60.0, float("nan"))])
    url = await serve(parts(ScriptedService(chunk("a"), usage_chunk()), cluster=cluster, monitor=monitor))
    async with watching(monitor):
        async with http.post(f"{url}/api/chat", json=CHAT) as answer:
            await answer.read()
        await until(lambda: monitor.history._rings and monitor.gpu_loads)
        await until(lambda: sum(read(monitor)) == 1)
        found = await get(http, f"{url}/api/cluster/history?seconds=60&step=1")
    assert sum(value or 0 for value in found["total"]["requests_per_second"]) == 1
    assert found["seconds"] == 60 and found["step"] == 1
    # A node that doesn't answer is left out.
    (alpha,) = found["nodes"]
    assert alpha["name"] == "alpha" and len(alpha["series"]["active"]) == 60
    devices = {device["id"]: device for device in alpha["devices"]}
    assert devices["CPU"]["granted_bytes"][-1] == 100 and devices["CPU"]["used_bytes"][-1] == 100
    assert devices["CUDA0"]["utilization"][-1] == 0.5 and devices["CUDA0"]["power_watts"][-1] is None


async def test_a_node_is_ready_until_it_drains(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    url = await serve(parts(cluster=cluster))
    assert await get(http, f"{url}/health") == {"status": "ok"}
    for path in ("health", "ready"):
        async with http.head(f"{url}/{path}") as answer:
            assert (answer.status, await answer.read()) == (200, b"")
    assert await get(http, f"{url}/ready") == {"status": "ready"}
    cluster.change(replace(cluster.me, draining=True))
    async with http.get(f"{url}/ready") as answer:
        assert answer.status == 503 and (await answer.json())["status"] == "draining"
    assert await get(http, f"{url}/health") == {"status": "ok"}


async def test_polling_is_counted_separately_from_requests(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(chunk(finish="stop"))))
    for _ in range(3):
        await get(http, f"{url}/api/cluster")
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.read()
    async with http.get(f"{url}/../{'x' * 50}") as answer:
        assert answer.status == 404
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    assert 'sollold_http_request_seconds_count{dialect="ollama",kind="poll"} 3.0' in text
    assert 'sollold_http_request_seconds_count{dialect="ollama",kind="request"} 2.0' in text
    assert "xxxxx" not in text, "unknown paths create no series"


async def test_metrics_of_many_models_are_short(serve: Serve, http: ClientSession) -> None:
    """Empty series are left out, and metrics that don't depend on the route have no label for it."""
    services = parts()
    for number in range(17):
        for path in ("/api/chat", "/v1/chat/completions", "/v1/embeddings"):
            stats = RequestStats(outcomes={"ok": 1}, prompt_tokens=5)
            stats.duration.observe(0.3)
            stats.queue.observe(0.0)
            stats.load.observe(0.0)
            if path != "/v1/embeddings":
                stats.first_token.observe(0.3)
                stats.inter_token.observe(0.03)
            services.monitor.activity.stats[path, f"demo{number}:latest"] = stats
    url = await serve(services)
    async with http.get(f"{url}/metrics", headers={"Accept-Encoding": "identity"}) as answer:
        plain = await answer.read()
        assert "Content-Encoding" not in answer.headers
    text = plain.decode()
    assert 'sollold_request_queue_time_seconds_count{model="demo0:latest"} 3.0' in text
    assert 'sollold_inter_token_latency_seconds_sum{model="demo0:latest"} 0.06' in text
    assert 'sollold_time_to_first_token_seconds_count{model="demo0:latest",route="/api/chat"} 1.0' in text
    assert 'seconds_count{model="demo0:latest",route="/v1/embeddings"} 1.0' in text
    assert 'first_token_seconds_count{model="demo0:latest",route="/v1/embeddings"}' not in text
    assert len(plain) < 200_000
    async with http.get(f"{url}/metrics", headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert int(answer.headers["Content-Length"]) < len(plain) / 10
        assert "sollold_requests_total" in await answer.text()
