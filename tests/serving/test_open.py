"""Requests over one node and over two: routing, queueing, answers, cancellation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Grant, GrantState, State
from sollold.errors import Fault, Refusal
from sollold.machine.device import Device, Kind
from sollold.serving import opening
from sollold.serving.candidate import EndpointQuery
from sollold.serving.drain import drain
from sollold.serving.engine_error import engine_refusal
from sollold.serving.loader import Ready
from sollold.serving.request import Answer, Call, Engine, Waiting
from sollold.settings.schema import HttpSettings, PlacementSettings, ServingSettings
from tests.doubles import until
from tests.serving.cluster_double import MODEL, Cluster, Node, ask, text_of
from tests.serving.reciter import TEXT, WORDS, Reciter


async def read(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(event) async for event in answer.events]


async def fetch(
    node: Node, *args: str, waits: list[Waiting] | None = None, **more: Any
) -> tuple[list[dict[str, Any]], Answer]:
    answer = await node.serving.open(ask(*args, **more), (waits if waits is not None else []).append)
    return await read(answer), answer


async def two_nodes(cluster: Cluster, slots: int = 4) -> tuple[Node, Node, Reciter]:
    """Node a, which receives the request, and node b, which has the endpoint."""
    a, b = await cluster.node("a"), await cluster.node("b")
    reciter = await cluster.reciter()
    b.engines.serve("d1", reciter, slots=slots)
    return a, b, reciter


@pytest.mark.parametrize("form", ["chat", "text", "native"])
@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_streamed_answer_is_complete_and_in_order(cluster: Cluster, form: str, asked: str) -> None:
    a, b, _ = await two_nodes(cluster)
    events, answer = await fetch(a if asked == "a" else b, form)
    assert text_of(events) == TEXT
    assert answer.routing.node == "host-b"
    assert answer.routing.backend is Backend.LOCAL
    assert answer.routing.coordinator_url == "http://127.0.0.1:11435"
    assert answer.routing.resumed == 0
    await until(lambda: b.server.under_way == 0 and b.engines.inside == 0)


async def test_an_engine_that_closes_idle_connections_is_not_considered_dead(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster)
    reciter.once = True
    for _ in range(4):
        given = [fetch(node, id=f"{node.name}-{n}", stream=False) for node in (a, b) for n in range(4)]
        for events, answer in await asyncio.gather(*given):
            assert text_of(events) == TEXT and answer.routing.resumed == 0
    assert len(reciter.requests) == 32
    assert b.engines.failed == []


async def test_events_are_the_engines_unchanged_bytes(cluster: Cluster) -> None:
    a, _, _ = await two_nodes(cluster)
    answer = await a.serving.open(ask("chat"), lambda _: None)
    events = [event async for event in answer.events]
    assert events[0].startswith(b'{"choices":[{"finish_reason":null')
    assert len(events) == 1 + len(WORDS) + 2
    assert b"[DONE]" not in b"".join(events)


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_non_streamed_answer_is_one_event(cluster: Cluster, asked: str) -> None:
    a, b, _ = await two_nodes(cluster)
    events, _ = await fetch(a if asked == "a" else b, "chat", stream=False)
    assert len(events) == 1
    assert text_of(events) == TEXT


async def test_a_big_request_reaches_the_engine_without_the_callers_headers(cluster: Cluster) -> None:
    a, _, reciter = await two_nodes(cluster)
    await fetch(a, "chat", max_tokens=1, padding="x" * 9_000_000)
    _, body, headers = reciter.requests[0]
    assert len(body["padding"]) == 9_000_000
    assert "X-Conversation-Id" not in headers


async def test_before_discovery_ends_no_model_is_reported_missing(cluster: Cluster) -> None:
    a, _, _ = await two_nodes(cluster)
    a.names.late.add("reciter")
    asking = asyncio.create_task(fetch(a, model="reciter"))
    done, _ = await asyncio.wait([asking], timeout=0.3)
    assert not done
    a.names.learned.set()
    assert text_of((await asking)[0]) == TEXT


async def test_a_node_that_stops_while_it_looks_up_a_name_refuses_the_request(cluster: Cluster) -> None:
    a = await cluster.node("a")
    a.engines.serve("d1", await cluster.reciter())
    a.names.late.add("reciter")
    asking = asyncio.create_task(a.serving.open(ask(), lambda _: None))
    await asyncio.sleep(0)
    a.serving.refuse("this node is stopping")
    a.names.learned.set()
    with pytest.raises(Refusal, match="this node is stopping; use another node"):
        await asking
    assert not a.serving.under_way


async def test_unknown_and_ambiguous_names(cluster: Cluster) -> None:
    a = await cluster.node("a")
    with pytest.raises(Refusal) as unknown:
        await fetch(a, model="nothing")
    assert unknown.value.fault is Fault.NOT_FOUND
    with pytest.raises(Refusal) as ambiguous:
        await fetch(a, model="two")
    assert ambiguous.value.fault is Fault.AMBIGUOUS
    assert "two:a" in ambiguous.value.message


async def test_a_model_of_an_offline_node_is_unavailable_and_not_missing(cluster: Cluster) -> None:
    a = await cluster.node("a")
    with pytest.raises(Refusal) as away:
        await fetch(a, model="elsewhere")
    assert away.value.fault is Fault.UNAVAILABLE and away.value.retry_after > 0
    assert "is only on host-z, which is offline" in away.value.message


async def test_an_engine_error_keeps_status_and_message(cluster: Cluster) -> None:
    a, _, reciter = await two_nodes(cluster)
    reciter.status = 400
    with pytest.raises(Refusal) as refused:
        await fetch(a)
    assert (refused.value.fault, refused.value.status) == (Fault.ENGINE, 400)
    assert refused.value.message == "status 400"


OLLAMA = "ollama:m"
CHAT = {**ask("chat").calls, **ask("ollama").calls}
WHOLE = {**CHAT, **ask("chat", stream=False).calls}
"""Calls of a non-streamed request, with a streamed call of Ollama."""


async def ollama_and_llama(cluster: Cluster) -> tuple[Node, Reciter, Reciter]:
    """Node a, an Ollama on node b, which the router prefers, and an engine for a later llama-server."""
    a, b = await cluster.node("a"), await cluster.node("b")
    at_ollama, at_llama = await cluster.reciter(), await cluster.reciter()
    b.engines.serve(OLLAMA, at_ollama, backend=Backend.OLLAMA)
    return a, at_ollama, at_llama


async def test_after_an_ollama_failure_the_leader_is_asked_for_a_distributed_load(
    cluster: Cluster,
) -> None:
    a, at_ollama, at_llama = await ollama_and_llama(cluster)
    at_ollama.status = 500
    c = await cluster.node("c")

    async def load() -> Ready:
        c.engines.serve("d1", at_llama)
        return Ready("c", c.view.me.endpoints[0])

    a.loader.load = load
    events, answer = await fetch(a, calls=CHAT)
    assert text_of(events) == TEXT and answer.routing.engine is Engine.LLAMA
    (need,) = a.loader.needs
    assert (need.ask.llama, need.ask.ollama) == (True, False), "the Ollama has failed already"
    assert len(at_ollama.requests) == 1


@pytest.mark.parametrize(
    ("fault", "words"), [(Fault.TOO_BIG, "3 GiB are missing"), (Fault.UNAVAILABLE, "status 500")]
)
async def test_if_the_distributed_load_fails_too_the_better_reason_is_reported(
    cluster: Cluster, fault: Fault, words: str
) -> None:
    a, at_ollama, _ = await ollama_and_llama(cluster)
    at_ollama.status = 500

    async def load() -> Ready:
        raise Refusal(fault, "3 GiB are missing")

    a.loader.load = load
    with pytest.raises(Refusal, match=words):
        await fetch(a, calls=CHAT)


async def test_a_resolved_model_is_not_looked_up_again(cluster: Cluster) -> None:
    a, _, _ = await two_nodes(cluster)
    listed = await a.names.named("reciter")
    events, _ = await fetch(a, model="a name that only the caller knows", resolved=listed)
    assert text_of(events) == TEXT


async def test_a_request_refused_by_an_ollama_causes_no_load(cluster: Cluster) -> None:
    a, at_ollama, _ = await ollama_and_llama(cluster)
    at_ollama.status = 400
    with pytest.raises(Refusal, match="status 400"):
        await fetch(a, calls=CHAT)
    assert a.loader.loads == 0


async def test_the_leader_decides_about_a_model_that_an_ollama_has_no_memory_for(
    cluster: Cluster,
) -> None:
    a, _, _ = await ollama_and_llama(cluster)
    b = cluster.nodes[1]
    device = Device("CPU", Kind.CPU, "cpu", 100, 100, 100, 0, 100)
    endpoint = replace(b.view.me.endpoints[0], loaded=False)
    b.view.update_me(devices=(device,), endpoints=(endpoint,))
    a.names.size = 90

    async def load() -> Ready:
        return Ready("b", endpoint)

    a.loader.load = load
    events, _ = await fetch(a, calls=CHAT)
    assert text_of(events) == TEXT and a.loader.loads == 1
    a.names.size = 80
    await fetch(a, calls=CHAT, id="r2")
    assert a.loader.loads == 1, "a model that certainly fits needs no decision of the leader"


async def test_a_non_streamed_answer_interrupted_at_an_ollama_is_repeated_on_llama_server(
    cluster: Cluster,
) -> None:
    a, at_ollama, at_llama = await ollama_and_llama(cluster)
    at_ollama.gate.clear()
    task = asyncio.create_task(fetch(a, calls=WHOLE, stream=False))
    await until(lambda: at_ollama.running == 1)
    c = await cluster.node("c")
    c.engines.serve("d1", at_llama)
    cluster.nodes[1].engines.drop(OLLAMA)
    await at_ollama.stop()
    events, answer = await task
    assert text_of(events) == TEXT
    assert (answer.routing.engine, answer.routing.node) == (Engine.LLAMA, "host-c")
    assert answer.routing.resumed == 1


async def test_queue_positions_are_reported_and_kept(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(a, id="first", user="first"))
    await until(lambda: reciter.running == 1)
    waits: list[Waiting] = []
    second = asyncio.create_task(fetch(a, id="second", user="second", waits=waits))
    await until(lambda: Waiting("queued", position=1) in waits)
    low: list[Waiting] = []
    third = asyncio.create_task(fetch(b, id="third", user="third", waits=low, priority=1))
    await until(lambda: Waiting("queued", position=2) in low)
    high: list[Waiting] = []
    fourth = asyncio.create_task(fetch(a, id="fourth", user="fourth", waits=high, priority=9))
    await until(lambda: Waiting("queued", position=1) in high)
    await until(lambda: waits[-1].position == 2 and low[-1].position == 3)
    reciter.gate.set()
    results = await asyncio.gather(first, second, third, fourth)
    assert [text_of(events) for events, _ in results] == [TEXT] * 4
    assert [body["user"] for _, body, _ in reciter.requests] == ["first", "fourth", "second", "third"]


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_request_is_reported_as_answering_before_the_engines_first_byte(
    cluster: Cluster, asked: str
) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    node = a if asked == "a" else b
    reciter.gate.clear()
    first, second = list[Waiting](), list[Waiting]()
    first_task = asyncio.create_task(fetch(node, id="first", stream=False, waits=first))
    await until(lambda: reciter.running == 1)
    assert (first[-1].stage, first[-1].node) == ("answering", "host-b")
    second_task = asyncio.create_task(fetch(node, id="second", stream=False, waits=second))
    await until(lambda: second and second[-1].stage == "queued")
    assert second[-1].node == ""
    reciter.gate.set()
    await asyncio.gather(first_task, second_task)
    assert (second[-1].stage, second[-1].node) == ("answering", "host-b")


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_cancelled_request_leaves_the_queue(cluster: Cluster, asked: str) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    node = a if asked == "a" else b
    reciter.gate.clear()
    first = asyncio.create_task(fetch(node, id="first"))
    await until(lambda: reciter.running == 1)
    waits: list[Waiting] = []
    second = asyncio.create_task(fetch(node, id="second", waits=waits))
    await until(lambda: any(wait.stage == "queued" for wait in waits))
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await until(lambda: b.server.under_way == 1)
    reciter.gate.set()
    events, _ = await first
    assert text_of(events) == TEXT
    assert len(reciter.requests) == 1
    assert a.serving.under_way == b.serving.under_way == 0


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_closing_the_answer_ends_the_generation(cluster: Cluster, asked: str) -> None:
    a, b, reciter = await two_nodes(cluster)
    reciter.pause = 0.01
    node = a if asked == "a" else b
    answer = await node.serving.open(ask(), lambda _: None)
    assert await anext(answer.events)
    await answer.close()
    await until(lambda: reciter.cancelled == 1 and b.server.under_way == 0 and b.engines.inside == 0)
    assert node.serving.under_way == 0


async def test_an_endpoint_that_vanishes_with_its_last_request_counts_none(cluster: Cluster) -> None:
    _, b, reciter = await two_nodes(cluster)
    reciter.pause = 0.01
    answer = await b.serving.open(ask(), lambda _: None)
    assert await anext(answer.events)
    await until(lambda: b.engines.reports and b.engines.reports[-1][:2] == ("d1", 1))
    b.engines.drop("d1")
    await answer.close()
    cluster.world.changed()
    assert not b.server._states
    await until(lambda: b.engines.reports[-1][:3] == ("d1", 0, 0))


async def test_an_unloaded_model_is_loaded_once_and_callers_keep_their_order(cluster: Cluster) -> None:
    a = await cluster.node("a")
    reciter = await cluster.reciter()
    go = asyncio.Event()

    async def load() -> Ready:
        await go.wait()
        endpoint = Endpoint("d1", MODEL, "", Backend.LOCAL, State.READY, context=4096)
        if not a.view.me.endpoints:
            a.engines.serve("d1", reciter, slots=1)
        return Ready("a", endpoint)

    a.loader.load = load
    waits: list[Waiting] = []
    tasks: list[asyncio.Task[tuple[list[dict[str, Any]], Answer]]] = []

    def all_wait() -> bool:
        return [wait.stage for wait in waits].count("loading") == len(tasks)

    for n in range(5):
        tasks.append(asyncio.create_task(fetch(a, id=f"r{n}", waits=waits, max_tokens=3, user=str(n))))
        await until(all_wait)
    go.set()
    results = await asyncio.gather(*tasks)
    assert all(text_of(events) == "".join(WORDS[:3]) for events, _ in results)
    assert [body["user"] for _, body, _ in reciter.requests] == ["0", "1", "2", "3", "4"]
    assert all(answer.routing.load_ms > 0 for _, answer in results)
    first = results[0][1].routing
    assert first.queue_ms < first.load_ms, "the load time is not queue time"


async def test_an_unreachable_endpoint_is_replaced(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster)
    await reciter.stop()
    good = await cluster.reciter()
    task = asyncio.create_task(fetch(a))
    await until(lambda: a.router._memory)
    b.engines.drop("d1")
    b.engines.serve("d2", good)
    events, _ = await task
    assert text_of(events) == TEXT


async def test_constant_changes_of_the_records_cause_no_flood_of_attempts(cluster: Cluster) -> None:
    """As in a big cluster, while the leader names an endpoint that can't be reached from here."""
    a, b, reciter = await two_nodes(cluster)
    await reciter.stop()

    async def load() -> Ready:
        return Ready("b", b.view.me.endpoints[0])

    a.loader.load = load
    task = asyncio.create_task(fetch(a))
    await until(lambda: a.loader.loads)
    ends = asyncio.get_running_loop().time() + 0.5
    while asyncio.get_running_loop().time() < ends:
        cluster.world.changed()
        await asyncio.sleep(0.001)
    assert a.loader.loads < 15
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_unreachable_node_is_skipped(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster)
    c = await cluster.node("c")
    c.engines.serve("d2", reciter)
    await b.peers.stop()
    for _ in range(4):
        events, answer = await fetch(a)
        assert text_of(events) == TEXT
        assert answer.routing.node == "host-c"


@pytest.mark.parametrize("path", ["/detokenize", "/apply-template", "/v1/chat/completions/input_tokens"])
async def test_token_requests_are_answered_while_every_slot_is_busy(cluster: Cluster, path: str) -> None:
    a, _, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    busy = asyncio.create_task(fetch(a))
    await until(lambda: reciter.running == 1)
    calls = {Engine.LLAMA: Call(path, {})}
    async with asyncio.timeout(5):
        events, _ = await fetch(a, id="aside", calls=calls, stream=False)
    assert events == [{"path": path}] and not busy.done()
    reciter.gate.set()
    await busy


def test_a_text_too_long_to_embed_is_a_caller_error() -> None:
    message = "input (300 tokens) is too large to process. increase the physical batch size (batch size: 128)"
    refusal = engine_refusal(500, json.dumps({"error": {"message": message}}).encode())
    assert (refusal.status, refusal.message) == (400, message)
    assert engine_refusal(500, b'{"error":{"message":"out of memory"}}').status == 500


async def test_the_total_size_of_waiting_bodies_is_limited(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(bodies=5000)
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(a, id="1", padding="x" * 3000))
    await until(lambda: reciter.running == 1)
    with pytest.raises(Refusal) as refused:
        await fetch(a, id="2", padding="x" * 3000)
    assert refused.value.fault is Fault.UNAVAILABLE and refused.value.retry_after > 0
    small = asyncio.create_task(fetch(a, id="3"))
    await until(lambda: b.server.under_way == 2)
    reciter.gate.set()
    await asyncio.gather(first, small)
    # A single request is accepted whatever its size.
    await fetch(a, id="4", padding="x" * 9000)


async def test_one_client_takes_at_most_half_of_the_room_for_bodies(cluster: Cluster) -> None:
    cluster.settings = ServingSettings(bodies=10_000)
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    tasks = [asyncio.create_task(fetch(a, client="10.0.0.8", padding="x" * 4000))]
    await until(lambda: reciter.running == 1)
    with pytest.raises(Refusal, match="too much memory"):
        await fetch(b, id="second", client="10.0.0.8", padding="x" * 4000)
    tasks.append(asyncio.create_task(fetch(b, id="other", client="10.0.0.9", padding="x" * 4000)))
    await until(lambda: b.server.under_way == 2)
    reciter.gate.set()
    await asyncio.gather(*tasks)
    await fetch(a, id="later", client="10.0.0.8", padding="x" * 4000)


async def test_a_node_that_stops_sending_its_request_is_dropped(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.serving.peer_handler._SILENCE_SECONDS", 0.2)
    _, b, _ = await two_nodes(cluster)
    reader, writer = await asyncio.open_connection("127.0.0.1", b.peers.port)
    writer.write(b"POST /serve HTTP/1.1\r\nHost: b\r\nX-Peer: a\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(3):
        writer.write(b"x")
        await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_programs_on_different_machines_count_as_different_clients(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    tasks = []
    for number, node in enumerate((a, a, a, b)):
        tasks.append(asyncio.create_task(fetch(node, id=f"r{number}", user=f"{number}", client="127.0.0.1")))
        await until(lambda: b.server.under_way == len(tasks))
    reciter.gate.set()
    await asyncio.gather(*tasks)
    assert [body["user"] for _, body, _ in reciter.requests] == ["0", "3", "1", "2"]


async def test_a_full_queue_is_refused_with_a_retry_time(cluster: Cluster) -> None:
    cluster.settings = type(cluster.settings)(queue=1)
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    tasks = [asyncio.create_task(fetch(a, id=f"r{n}")) for n in range(2)]
    await until(lambda: b.server.under_way == 2)
    with pytest.raises(Refusal) as full:
        await fetch(a, id="one too many")
    assert full.value.fault is Fault.UNAVAILABLE
    assert full.value.retry_after >= 1
    reciter.gate.set()
    await asyncio.gather(*tasks)


async def test_deadline_ends_waiting_and_streaming(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.pause = 0.05
    with pytest.raises(Refusal) as late:
        await fetch(a, deadline=0.3)
    assert late.value.fault is Fault.TIMEOUT
    await until(lambda: not reciter.running)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(a, id="first", user="first"))
    await until(lambda: reciter.running == 1)
    with pytest.raises(Refusal, match="deadline of 200 ms") as waited:
        # The rest of 200 ms after the caller's own overhead.
        await fetch(a, id="second", user="second", deadline=0.199834)
    assert waited.value.fault is Fault.TIMEOUT
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: b.server.under_way == 0)


async def test_a_queued_request_moves_to_a_free_endpoint(cluster: Cluster) -> None:
    a, b, slow = await two_nodes(cluster, slots=1)
    slow.gate.clear()
    first = asyncio.create_task(fetch(a, id="first", user="first"))
    await until(lambda: slow.running == 1)
    waits: list[Waiting] = []
    second = asyncio.create_task(fetch(a, id="second", user="second", waits=waits))
    await until(lambda: any(wait.stage == "queued" for wait in waits))
    c = await cluster.node("c")
    c.engines.serve("d2", await cluster.reciter())
    events, answer = await second
    assert text_of(events) == TEXT
    assert answer.routing.node == "host-c"
    await until(lambda: b.server.under_way == 1)
    slow.gate.set()
    await first


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_request_that_an_engine_has_after_its_wait_does_not_move(
    cluster: Cluster, asked: str
) -> None:
    a, b, slow = await two_nodes(cluster, slots=1)
    node = a if asked == "a" else b
    slow.gate.clear()
    first = asyncio.create_task(fetch(node, id="first", user="first", stream=False))
    await until(lambda: slow.running == 1)
    waits: list[Waiting] = []
    second = asyncio.create_task(fetch(node, id="second", user="second", waits=waits, stream=False))
    await until(lambda: any(wait.stage == "queued" for wait in waits))
    first.cancel()
    await until(lambda: len(slow.requests) == 2 and slow.running == 1)
    c = await cluster.node("c")
    other = await cluster.reciter()
    c.engines.serve("d2", other)
    await asyncio.sleep(0.6)
    assert slow.running == 1 and not other.requests
    slow.gate.set()
    _, answer = await second
    assert answer.routing.node == "host-b"


async def test_a_request_cancelled_while_moving_is_counted_on_no_endpoint(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, slow = await two_nodes(cluster, slots=1)
    slow.gate.clear()
    first = asyncio.create_task(fetch(a, id="first"))
    await until(lambda: slow.running == 1)
    waits: list[Waiting] = []
    second = asyncio.create_task(fetch(a, id="second", waits=waits))
    await until(lambda: any(wait.stage == "queued" for wait in waits))
    cancel = opening.StreamOpening.cancel

    async def hanging_up(attempt: opening.StreamOpening) -> None:
        second.cancel()
        await cancel(attempt)

    monkeypatch.setattr(opening.StreamOpening, "cancel", hanging_up)
    c = await cluster.node("c")
    c.engines.serve("d2", await cluster.reciter())
    with pytest.raises(asyncio.CancelledError):
        await second
    monkeypatch.undo()
    slow.gate.set()
    await first
    query = EndpointQuery(MODEL, frozenset((Engine.LLAMA,)))
    assert [scored.load for scored in a.router.candidates(a.view.live(), query, 1e9)] == [0, 0]


async def test_a_stopping_node_refuses_requests_and_interrupts_streams_with_a_reason(
    cluster: Cluster,
) -> None:
    a, _, reciter = await two_nodes(cluster)
    reciter.pause = 0.05
    answer = await a.serving.open(ask(id="running"), lambda _: None)
    running = asyncio.create_task(read(answer))
    a.serving.refuse("this node is stopping")
    with pytest.raises(Refusal) as late:
        await fetch(a, id="late")
    assert late.value.fault is Fault.UNAVAILABLE and late.value.retry_after > 0
    assert reciter.running == 1
    await a.serving.close()
    with pytest.raises(Refusal) as broken:
        await running
    assert broken.value.fault is Fault.INTERRUPTED and "this node is stopping" in broken.value.message


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_that_reads_only_after_the_stop_gets_an_error(
    cluster: Cluster, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.serving.service._CLOSE_SECONDS", 0.05)
    a, _, _ = await two_nodes(cluster)
    answer = await a.serving.open(ask(stream=stream), lambda _: None)
    if stream:
        assert not await answer.pour(lambda events: False)
    await a.serving.close()
    with pytest.raises(Refusal, match="this node is stopping") as interrupted:
        await answer.pour(lambda events: True)
    assert interrupted.value.fault is Fault.INTERRUPTED


@pytest.mark.parametrize("waits_for", ["a load", "a place"])
async def test_a_stopping_node_refuses_waiting_requests_with_a_reason(
    cluster: Cluster, waits_for: str
) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(b, id="first"))
    await until(lambda: reciter.running == 1)
    if waits_for == "a load":
        b.engines.drop("d1")
    waits: list[Waiting] = []
    waiting = asyncio.create_task(fetch(a, id="waiting", waits=waits))
    await until(lambda: waits)
    for executor in tuple(a.serving._executors):
        executor.stop("this node is stopping")
    await a.serving.close()
    with pytest.raises(Refusal) as left:
        async with asyncio.timeout(1):
            await waiting
    assert waiting.cancelling() == 0
    assert left.value.fault is Fault.UNAVAILABLE and left.value.retry_after > 0
    assert left.value.message == "this node is stopping; use another node"
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_reloaded_limits_apply_to_the_next_request(cluster: Cluster) -> None:
    a = await cluster.node("a")
    a.serving.use_settings(cluster.settings, HttpSettings(wait_limit=0.3), PlacementSettings())
    a.loader.load = nothing_yet
    with pytest.raises(Refusal) as late:
        async with asyncio.timeout(4):
            await fetch(a)
    assert late.value.fault is Fault.UNAVAILABLE


async def nothing_yet() -> None:
    """A load that takes longer than the wait limit."""
    await asyncio.sleep(0.4)


async def test_load_only_and_unload(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster)
    answer = await a.serving.open(ask(load_only=True, keep_alive=60.0), lambda _: None)
    assert [event async for event in answer.events] == []
    assert b.engines.keep_alives[-1] == 60.0
    assert not any(path == "/v1/chat/completions" for path, _, _ in reciter.requests)
    answer = await a.serving.open(ask(load_only=True, keep_alive=0.0), lambda _: None)
    assert [event async for event in answer.events] == []
    assert a.loader.dropped == [MODEL]
    await until(lambda: a.serving.under_way == 0)


async def test_every_ollama_is_told_to_unload_even_if_its_slots_are_busy(cluster: Cluster) -> None:
    a, b, c = [await cluster.node(name) for name in "abc"]
    busy, idle = await cluster.reciter(), await cluster.reciter()
    busy.hang_after = 3
    b.engines.serve(OLLAMA, busy, slots=1, backend=Backend.OLLAMA)
    answering = await a.serving.open(ask("generate", id="long"), lambda _: None)
    assert await anext(answering.events)
    c.engines.serve(OLLAMA, idle, slots=1, backend=Backend.OLLAMA)
    async with asyncio.timeout(3):
        await fetch(a, "generate", id="stop", load_only=True, keep_alive=0.0, stream=False, prompt="")
    for reciter in (busy, idle):
        assert reciter.requests[-1][1]["prompt"] == ""
    await answering.close()
    query = EndpointQuery(MODEL, frozenset((Engine.OLLAMA,)))
    await until(lambda: b.server.under_way == c.server.under_way == 0)
    loads = [scored.load for scored in a.router.candidates(a.view.live(), query, 1e9)]
    assert loads == [0, 0]


async def test_a_failed_unload_is_reported(cluster: Cluster) -> None:
    a, b = await cluster.node("a"), await cluster.node("b")
    reciter = await cluster.reciter()
    b.engines.serve(OLLAMA, reciter, backend=Backend.OLLAMA)
    reciter.status = 500
    with pytest.raises(Refusal) as refused:
        await fetch(a, "generate", load_only=True, keep_alive=0.0, stream=False, prompt="")
    assert refused.value.message == "status 500"
    await until(lambda: b.server.under_way == 0)


async def test_scores_are_explained_when_asked_for(cluster: Cluster) -> None:
    a, _, _ = await two_nodes(cluster)
    _, answer = await fetch(a, explain=True)
    ((endpoint, score, why),) = answer.routing.scores
    assert endpoint == "b/d1"
    assert score > 0
    assert "loaded" in why


async def test_a_draining_node_moves_queued_requests_and_finishes_streams(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(a, id="first", user="first"))
    await until(lambda: reciter.running == 1)
    second = asyncio.create_task(fetch(a, id="second", user="second"))
    await until(lambda: b.server.under_way == 2)
    c = await cluster.node("c")
    draining = asyncio.create_task(drain(b.view, b.server, b.serving, cluster.settings, "node b is leaving"))
    await until(lambda: b.server.under_way == 1)
    c.engines.serve("d2", await cluster.reciter())
    events, answer = await second
    assert text_of(events) == TEXT
    assert answer.routing.node == "host-c"
    reciter.gate.set()
    events, answer = await first
    assert answer.routing.node == "host-b"
    assert answer.routing.resumed == 0
    await draining
    assert b.view.me.draining


@pytest.mark.parametrize(("others", "having"), [(False, ""), (True, ""), (True, "bc"), (True, "b")])
async def test_a_stopping_node_does_not_wait_for_requests_that_no_node_can_answer(
    cluster: Cluster, others: bool, having: str
) -> None:
    b, reciter = await cluster.node("b"), await cluster.reciter()
    b.engines.serve("d1", reciter, slots=1)
    b.names.having = set(having)
    c = await cluster.node("c") if others else None
    reciter.gate.clear()
    first = asyncio.create_task(fetch(b, id="first", user="first"))
    await until(lambda: reciter.running == 1)
    second = asyncio.create_task(fetch(b, id="second", user="second"))
    await until(lambda: b.server.under_way == 2)
    b.serving.refuse("this node is stopping")
    draining = asyncio.create_task(drain(b.view, b.server, b.serving, cluster.settings, "node b is leaving"))
    if c is not None and having != "b":
        await until(lambda: b.server.under_way == 1)
        c.engines.serve("d2", await cluster.reciter())
        assert (await second)[1].routing.node == "host-c"
    else:
        with pytest.raises(Refusal) as left:
            async with asyncio.timeout(3):
                await second
        assert left.value.fault is Fault.UNAVAILABLE
        assert left.value.message == "this node is stopping; use another node"
    assert not first.done() and not draining.done()
    reciter.gate.set()
    events, _ = await first
    assert text_of(events) == TEXT
    async with asyncio.timeout(3):
        await draining


async def test_drain_waits_for_remote_deployments_with_local_grants(cluster: Cluster) -> None:
    b = await cluster.node("b")
    grant = Grant("d1", "CPU", 1000, "a", GrantState.COMMITTED)
    b.view.update_me(grants=(grant, Grant("d2", "CPU", 1000, "b", GrantState.COMMITTED)))
    draining = asyncio.create_task(drain(b.view, b.server, b.serving, cluster.settings, "node b is leaving"))
    await asyncio.sleep(0.3)
    assert not draining.done()
    b.view.update_me(grants=())
    async with asyncio.timeout(2):
        await draining


async def test_a_closing_endpoint_finishes_streams_and_moves_queued_requests(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    first = asyncio.create_task(fetch(a, id="first", user="first"))
    await until(lambda: reciter.running == 1)
    second = asyncio.create_task(fetch(a, id="second", user="second"))
    await until(lambda: b.server.under_way == 2)
    b.view.update_me(endpoints=tuple(replace(endpoint, closing=True) for endpoint in b.view.me.endpoints))
    await until(lambda: b.server.under_way == 1)
    c = await cluster.node("c")
    c.engines.serve("d2", await cluster.reciter())
    assert (await second)[1].routing.node == "host-c"
    third = await fetch(a, id="third", user="third")
    assert third[1].routing.node == "host-c"
    reciter.gate.set()
    events, answer = await first
    assert text_of(events) == TEXT
    assert (answer.routing.node, answer.routing.resumed) == ("host-b", 0)


async def test_64_streams_are_complete_and_in_order(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=64)
    reciter.gate.clear()
    giving = [asyncio.create_task(fetch(a, id=f"r{n}")) for n in range(64)]
    await until(lambda: ("d1", 64, 0, 0.0) in b.engines.reports)
    reciter.gate.set()
    results = await asyncio.gather(*giving)
    assert all(text_of(events) == TEXT for events, _ in results)
    await until(lambda: b.engines.reports[-1][1:3] == (0, 0))


async def test_requests_are_distributed_by_the_speed_of_the_ollamas(cluster: Cluster) -> None:
    """Three Ollamas of relative speed 1, 1 and ½, not measured yet, with one slot each."""
    a = await cluster.node("a")
    paces = {"b": 0.01, "c": 0.01, "d": 0.02}
    for name, pace in paces.items():
        node = await cluster.node(name)
        reciter = await cluster.reciter()
        reciter.pause = pace
        node.engines.serve("ollama:m", reciter, slots=1, backend=Backend.OLLAMA)
    count = 60
    tasks = [fetch(a, "ollama", id=f"r{n}", options={"num_predict": 10}) for n in range(count)]
    results = await asyncio.gather(*tasks)
    assert all(text_of(events) == "".join(WORDS[:10]) for events, _ in results)
    served = [answer.routing.node for _, answer in results]
    # The slow engine gets its share and no more. Benchmarks on idle machines measure the time.
    assert 4 <= served.count("host-d") <= count // 3
    assert min(served.count("host-b"), served.count("host-c")) > max(count // 4, served.count("host-d"))


async def test_only_a_queued_request_needs_an_extra_task(cluster: Cluster) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    tasks: list[str] = []

    def noted(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
        tasks.append(getattr(coroutine, "__qualname__", ""))
        return asyncio.Task(coroutine, loop=loop, **more)

    asyncio.get_running_loop().set_task_factory(noted)
    await fetch(b, id="here")
    await fetch(a, id="elsewhere")
    assert not [name for name in tasks if name.startswith("StreamOpening.")]
    reciter.gate.clear()
    running = asyncio.create_task(fetch(b, id="running"))
    await until(lambda: b.server.under_way == 1)
    queued = asyncio.create_task(fetch(a, id="queued"))
    await until(lambda: "StreamOpening._open" in tasks)
    reciter.gate.set()
    await asyncio.gather(running, queued)


async def test_cancelling_before_the_first_byte_frees_the_slot(cluster: Cluster) -> None:
    _, b, reciter = await two_nodes(cluster, slots=1)
    reciter.gate.clear()
    for _ in range(2):
        asked = asyncio.create_task(fetch(b, id="gone"))
        await until(lambda: reciter.running == 1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: reciter.running == 0 and not b.server.under_way)
    reciter.gate.set()
    assert await fetch(b, id="stays")


@pytest.mark.parametrize("asked", ["a", "b"])
async def test_a_forced_unload_interrupts_running_and_queued_requests(cluster: Cluster, asked: str) -> None:
    a, b, reciter = await two_nodes(cluster, slots=1)
    reciter.pause = 0.01
    node = a if asked == "a" else b
    answer = await node.serving.open(ask(id="first"), lambda _: None)
    assert await anext(answer.events)
    waits: list[Waiting] = []
    queued = asyncio.create_task(fetch(node, id="second", waits=waits))
    await until(lambda: Waiting("queued", position=1) in waits)
    b.engines.force_out("d1")
    for ended in (read(answer), queued):
        with pytest.raises(Refusal, match="was unloaded with --force") as refusal:
            await ended
        assert refusal.value.fault is Fault.INTERRUPTED
    assert answer.routing.resumed == 0
