"""The application as callers meet it: shapes of errors, methods, CORS, waiting, hanging up."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession
from anthropic import AnthropicError, AsyncAnthropic
from openai import APIError, AsyncOpenAI

from sollold.api.app import Listener, build_app
from sollold.api.cluster_view import node_object
from sollold.api.parts import PlanAsk, Planned, Running
from sollold.api.reply import Patience
from sollold.config import GIB, MOST_SLOTS, HttpSettings
from sollold.machine.device import Device, Kind
from sollold.models.own_models import Told
from sollold.serving.ask import Engine, Fault, Refusal, Waiting
from tests.api.api_parts import (
    PlainCluster,
    PlainLibrary,
    PlainRelayed,
    Resumed,
    ScriptedPuller,
    ScriptedRelay,
    ScriptedService,
    call_of,
    chunk,
    endpoint,
    model,
    parts,
    record,
    usage_chunk,
)

Serve = Callable[..., Awaitable[str]]


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for is inside the application
            await asyncio.sleep(0.005)


async def test_root_says_what_clients_look_for(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url) as answer:
        assert await answer.text() == "Ollama is running"
    async with http.head(url) as answer:
        assert answer.status == 200


async def test_chat_streams_lines_with_routing_in_the_last(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(
        chunk(None, role="assistant"), chunk("Hel"), chunk("lo"), chunk(finish="stop"), usage_chunk()
    )
    url = await serve(parts(service))
    # As bare curl sends it: a form's Content-Type.
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with http.post(f"{url}/api/chat", data=json.dumps(CHAT), headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        assert answer.headers["X-Sollold-Backend"] == "llama.cpp-distributed"
        assert answer.headers["X-Sollold-Node"] == "beta"
        lines = [json.loads(line) async for line in answer.content]
    assert [line["message"]["content"] for line in lines] == ["Hel", "lo", ""]
    assert [line["done"] for line in lines] == [False, False, True]
    last = lines[-1]
    assert last["done_reason"] == "stop"
    assert last["prompt_eval_count"] == 7 and last["eval_count"] == 2
    assert last["eval_duration"] == 20_250_000 and last["prompt_eval_duration"] == 10_500_000
    assert last["load_duration"] == 12_000_000 and last["total_duration"] > 0
    assert last["_routing"]["backend"] == "llama.cpp-distributed"
    assert last["_routing"]["coordinator_url"] == "http://10.0.0.1:11435"
    assert last["_routing"]["devices"] == ["alpha/CPU", "beta/CPU"]
    await until(lambda: service.closed == 1)


async def test_chat_not_streamed(serve: Serve, http: ClientSession) -> None:
    whole = {
        "choices": [
            {"finish_reason": "length", "index": 0, "message": {"role": "assistant", "content": "Hello"}}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        "timings": {"prompt_n": 3, "prompt_ms": 1.0, "predicted_n": 1, "predicted_ms": 2.0},
    }
    service = ScriptedService(whole)
    url = await serve(parts(service))
    async with http.post(f"{url}/v1/api/chat", json={**CHAT, "stream": False}) as answer:
        record = await answer.json()
    assert record["message"] == {"role": "assistant", "content": "Hello"}
    assert record["done"] is True and record["done_reason"] == "length"
    assert record["_routing"]["node"] == "beta"
    assert call_of(service).body["stream"] is False


async def test_an_ollama_speaks_for_itself_but_for_the_last_line(serve: Serve, http: ClientSession) -> None:
    first = b'{"model":"demo","message":{"role":"assistant","content":"\\"done\\":true"},"done":false}'
    last = b'{"model":"demo","message":{"role":"assistant","content":""},"done":true,"eval_count":1}'
    service = ScriptedService(first, last, engine=Engine.OLLAMA)
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json={**CHAT, "options": {"odd": 1}}) as answer:
        lines = (await answer.read()).splitlines()
    assert lines[0] == first
    assert json.loads(lines[1])["_routing"]["backend"] == "ollama-pool"
    assert call_of(service, Engine.OLLAMA).body == {**CHAT, "options": {"odd": 1}}


async def test_a_fault_mid_stream_is_an_error_line(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), Refusal(Fault.INTERRUPTED, "the worker died"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        lines = [json.loads(line) async for line in answer.content]
    assert answer.status == 200
    assert lines[-1] == {"error": "the worker died"}
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        text = await answer.text()
    assert (
        json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"]
        == "the worker died"
    )
    assert "[DONE]" not in text


async def test_a_response_that_fails_in_its_stream_says_so_to_every_client(
    serve: Serve, http: ClientSession
) -> None:
    service = ScriptedService(chunk("a"), Refusal(Fault.INTERRUPTED, "the worker died"))
    url = await serve(parts(service))
    body = {"model": "demo", "input": "hi", "stream": True}
    async with http.post(f"{url}/v1/responses", json=body) as answer:
        text = await answer.text()
    events = [json.loads(part.split("data: ")[1]) for part in text.strip().split("\n\n")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    failed, error = events[-2:]
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "interrupted", "message": "the worker died"}
    assert error["type"] == "error" and error["error"]["message"] == "the worker died"
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(APIError, match="the worker died"):
            async for _ in await client.responses.create(model="demo", input="hi", stream=True):
                pass


async def test_a_bug_in_the_stream_is_no_traceback(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), ValueError("secret inside"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        text = await answer.text()
    assert "secret" not in text
    assert "error" in json.loads(text.splitlines()[-1])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/api/chat", b"{", 400, "not JSON"),
        ("/api/chat", b"", 400, "empty"),
        ("/api/chat", b"[1]", 400, "an array"),
        ("/api/chat", b"[" * 100_000, 400, "JSON"),
        ("/api/chat", b'{"model":"demo","messages":"x"}', 400, "messages"),
        ("/api/chat", b'{"model":"none","messages":[]}', 404, "model 'none' not found"),
        ("/api/chat", b"{}", 400, "model is required"),
        ("/api/chat", b'{"model":"demo","messages":[{"role":"user"}],"think":true}', 400, "thinking"),
        (
            "/api/chat",
            b'{"model":"demo","messages":[{"role":"user"}],"options":{"num_ctx":"x"}}',
            400,
            "num_ctx",
        ),
        ("/api/generate", b'{"model":"demo","prompt":"x","format":3}', 400, "format"),
        ("/api/generate", b'{"model":"demo","prompt":"x","keep_alive":"5 parsecs"}', 400, "keep_alive"),
        ("/api/show", b'{"model":"none"}', 404, "not found"),
        (
            "/v1/chat/completions",
            b'{"model":"none","messages":[{"role":"user","content":"x"}]}',
            404,
            "not found",
        ),
        ("/v1/chat/completions", b'{"model":"demo"}', 400, "messages"),
        ("/v1/chat/completions", b"nonsense", 400, "not JSON"),
        ("/v1/embeddings", b'{"model":"demo","input":{}}', 400, "input"),
        (
            "/v1/chat/completions",
            b'{"model":"demo","messages":[{"role":"assistant","content":[{"type":"text","text":5}]}]}',
            400,
            "needs a text",
        ),
        ("/v1/responses", b'{"model":"demo","input":[{"type":"reasoning","content":5}]}', 400, "parts"),
    ],
)
async def test_bad_requests_have_the_dialects_shape(
    serve: Serve, http: ClientSession, path: str, body: bytes, status: int, said: str
) -> None:
    url = await serve(parts())
    async with http.post(url + path, data=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    if path.startswith("/v1"):
        assert set(error) == {"message", "type", "param", "code"}
        error = error["message"]
    assert said in error


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"cut \ud83d", "cut \ufffd"),
        (rb"cut \ud83d here", "cut \ufffd here"),
        (rb"\ude00 \ud83d\ude00 \ud83d\u0041", "\ufffd \U0001f600 \ufffdA"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\\ud83d \\\ud83d", "\\ud83d \\\ufffd"),
    ],
)
async def test_half_a_character_is_read_as_ollama_reads_it(
    serve: Serve, http: ClientSession, sent: bytes, read: str
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    body = b'{"model":"demo","messages":[{"role":"user","content":"' + sent + b'"}]}'
    async with http.post(f"{url}/api/chat", data=body) as answer:
        assert answer.status == 200
    assert call_of(service).body["messages"][0]["content"] == read


async def test_a_body_that_is_not_packed_as_it_says_is_the_callers_fault(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    url = await serve(parts())
    raw, headers = msgspec.json.encode(CHAT), {"Content-Encoding": "gzip"}
    async with http.post(f"{url}/v1/chat/completions", data=raw, headers=headers) as answer:
        assert answer.status == 400
        assert "can't be read" in (await answer.json())["error"]["message"]
    # Answered on a connection of its own, so whatever the first had to say is said.
    async with http.get(f"{url}/api/version") as answer:
        assert answer.status == 200
    assert not [line for line in caplog.records if line.exc_info]


async def test_unknown_routes_and_wrong_methods(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/api/nothing") as answer:
        assert answer.status == 404 and isinstance((await answer.json())["error"], str)
    async with http.get(f"{url}/v1/nothing") as answer:
        assert answer.status == 404 and "message" in (await answer.json())["error"]
    async with http.get(f"{url}/api/chat") as answer:
        assert answer.status == 405 and "POST" in answer.headers["Allow"]
        assert "not allowed" in (await answer.json())["error"]
    async with http.delete(f"{url}/v1/chat/completions") as answer:
        assert answer.status == 405 and "message" in (await answer.json())["error"]


@pytest.mark.parametrize(
    "refusal", [Refusal(Fault.TOO_BIG, "it does not fit"), Refusal(Fault.ENGINE, "boom", status=500)]
)
async def test_client_libraries_do_not_repeat_what_fails_again(serve: Serve, refusal: Refusal) -> None:
    service = ScriptedService()
    service.refusal = refusal
    url = await serve(parts(service))
    messages: Any = CHAT["messages"]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as openai:
        with pytest.raises(APIError, match=refusal.message):
            await openai.chat.completions.create(model="demo", messages=messages)
    async with AsyncAnthropic(base_url=url, api_key="none") as anthropic:
        with pytest.raises(AnthropicError, match=refusal.message):
            await anthropic.messages.create(model="demo", messages=messages, max_tokens=9)
    assert len(service.asks) == 2


async def test_refusals_before_the_first_byte_have_their_status(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    url = await serve(parts(service))
    service.refusal = Refusal(Fault.UNAVAILABLE, "loading, 43 %", retry_after=7)
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        assert answer.status == 503 and answer.headers["Retry-After"] == "7"
        assert "x-should-retry" not in answer.headers
        assert await answer.json() == {"error": "loading, 43 %"}
    service.refusal = Refusal(Fault.ENGINE, "context too long", status=400)
    async with http.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
        assert answer.status == 400
    service.refusal = Refusal(Fault.ENGINE, "boom", status=500)
    async with http.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
        assert answer.status == 502


async def test_waiting_shows_signs_of_life(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("ok"), chunk(finish="stop"), usage_chunk())
    service.gate = asyncio.Event()
    service.waitings = [Waiting("loading", 0.43)]
    url = await serve(parts(service), Patience(grace=0.02, every=0.02))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        assert answer.headers["X-Sollold-Status"] == "loading 43 %"
        first = json.loads(await answer.content.readline())
        assert first["message"]["content"] == "" and first["done"] is False
        assert first["_waiting"] == "loading 43 %"
        service.gate.set()
        rest = [json.loads(line) async for line in answer.content]
    assert "".join(line["message"]["content"] for line in rest) == "ok"
    service.gate.clear()
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert await answer.content.readline() == b": loading 43 %\n"
        service.gate.set()
        assert b": answering: llama.cpp-distributed on beta\n" in await answer.read()
    service.gate.clear()
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert await answer.content.readline() == b": loading 43 %\n"
        service.refusal = Refusal(Fault.TOO_BIG, "it does not fit")
        service.gate.set()
        text = (await answer.read()).decode()
    assert answer.status == 200 and "it does not fit" in text


async def test_silence_in_the_stream_is_filled(serve: Serve, http: ClientSession) -> None:
    go = asyncio.Event()
    service = ScriptedService(chunk("a"), go, chunk("b"))
    url = await serve(parts(service), Patience(grace=1, every=0.02))
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert b"a" in await answer.content.readline()
        await answer.content.readline()
        assert (await answer.content.readline()).startswith(b": ")
        go.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_what_was_waited_for_is_not_told_when_it_is_over(serve: Serve, http: ClientSession) -> None:
    go = asyncio.Event()
    service = ScriptedService(chunk("a"), Waiting("recovering"), Resumed(5.0), chunk("b"), go, chunk("c"))
    service.waitings = [Waiting("loading", 0.96)]
    url = await serve(parts(service), Patience(grace=1, every=0.02))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        said = ""
        while said != "ab":
            said += json.loads(await answer.content.readline())["message"]["content"]
        async with http.get(f"{url}/api/cluster") as cluster:
            assert [one["stage"] for one in (await cluster.json())["requests"]] == ["answering"]
        assert json.loads(await answer.content.readline())["_waiting"] == "answering"
        go.set()
        await answer.read()


async def test_hanging_up_leaves_the_line_and_ends_the_generation(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), asyncio.Event())
    service.gate = asyncio.Event()
    url = await serve(parts(service), Patience(grace=0.01, every=0.01))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
    await until(lambda: service.cancelled == 1)
    service.gate.set()
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
    await until(lambda: service.closed == 1)
    # Not streamed: the same.
    service.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await http.post(f"{url}/api/chat", json={**CHAT, "stream": False})
    await until(lambda: service.cancelled == 2)


async def test_a_caller_that_does_not_read_is_hung_up_on(serve: Serve) -> None:
    service = ScriptedService(*[chunk("x" * 100_000)] * 500)
    url = await serve(parts(service), Patience(grace=1, every=0.02, unread=0.2))
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1024)
    body = msgspec.json.encode(CHAT)
    writer.write(f"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    # Its place in the engine is free again.
    await until(lambda: service.closed == 1)
    writer.close()


async def test_bodies_of_waiting_requests_are_bounded_and_let_go(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService({"choices": []})
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=5000)
    body = {"model": "demo", "messages": [{"role": "user", "content": "x" * 3000}], "stream": False}

    async def post(path: str, data: Any) -> tuple[int, str, dict[str, Any]]:
        async with http.post(url + path, data=data) as answer:
            told = await answer.json(content_type=None)
            return answer.status, answer.headers.get("Retry-After", ""), told

    async def in_pieces(raw: bytes) -> AsyncIterator[bytes]:
        yield raw

    raw = msgspec.json.encode(body)
    waiting = asyncio.create_task(post("/api/chat", raw))
    async with asyncio.timeout(5):
        while not service.asks:  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.005)
    status, after, told = await post("/v1/chat/completions", raw)
    assert (status, after) == (503, "5") and "memory" in told["error"]["message"]
    # Also one that does not say how long it is.
    status, after, told = await post("/api/chat", in_pieces(raw))
    assert (status, after) == (503, "5") and "memory" in told["error"]
    service.gate.set()
    assert (await waiting)[0] == 200
    for _ in range(3):
        assert (await post("/api/chat", raw))[0] == 200


async def test_a_body_of_unknown_length_counts_while_it_comes(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService({"choices": []})
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=5000)

    async def endless() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        return reader, writer

    waiting = asyncio.create_task(http.post(f"{url}/api/chat", json={**CHAT, "stream": False}))
    await until(lambda: bool(service.asks))
    reader, writer = await endless()
    async with asyncio.timeout(5):
        assert b" 503 " in await reader.readline()
    writer.close()
    service.gate.set()
    assert (await waiting).status == 200
    # What is alone may be as long as it likes, also in pieces.
    reader, writer = await endless()
    body = msgspec.json.encode({**CHAT, "stream": False})
    for piece in (body[:20], body[20:], b""):
        await writer.drain()
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    async with asyncio.timeout(5):
        assert b" 200 " in await reader.readline()
    writer.close()


async def test_empty_requests_load_and_unload(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    url = await serve(parts(service))
    async with http.post(f"{url}/api/generate", json={"model": "demo"}) as answer:
        record = await answer.json(content_type=None)
    assert record["done_reason"] == "load" and record["response"] == "" and record["done"] is True
    assert service.asks[-1].load_only and service.asks[-1].keep_alive is None
    async with http.post(
        f"{url}/api/chat", json={"model": "demo", "keep_alive": 0, "stream": False}
    ) as answer:
        record = await answer.json()
    assert record["done_reason"] == "unload" and record["message"]["content"] == ""
    assert service.asks[-1].keep_alive == 0


@pytest.mark.parametrize(
    ("given", "seconds"), [("5m", 300), (90, 90), ("-1m", -1), (-1, -1), ("1h30m", 5400), (0, 0)]
)
async def test_keep_alive_in_all_its_forms(
    serve: Serve, http: ClientSession, given: Any, seconds: float
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json={**CHAT, "keep_alive": given}) as answer:
        assert answer.status == 200
    assert service.asks[-1].keep_alive == seconds


async def test_priority_client_and_context(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    body = {**CHAT, "options": {"num_ctx": 4096}}
    async with http.post(f"{url}/api/chat", json=body, headers={"X-Sollold-Priority": "URGENT"}) as answer:
        assert answer.status == 200
    assert (service.asks[-1].priority, service.asks[-1].context) == (9, 4096)
    assert service.asks[-1].client == "127.0.0.1"
    async with http.post(
        f"{url}/v1/chat/completions", json={**CHAT, "priority": 2}, headers={"Authorization": "Bearer sk-a"}
    ) as answer:
        assert answer.status == 200
    assert service.asks[-1].priority == 2 and service.asks[-1].client.startswith("key:")
    assert "priority" not in call_of(service).body
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Sollold-Role": "researcher"}) as answer:
        assert answer.status == 200
    assert service.asks[-1].priority == 8
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Sollold-Priority": "11"}) as answer:
        assert answer.status == 400


async def test_tags_show_and_ps_cover_the_cluster(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model(params='{"temperature":0.5,"stop":["<a>","<b>"]}', template="T"))
    library.loaded = (Running(endpoint(), "alpha"), Running(endpoint(id="d2"), "beta"))
    url = await serve(parts(library=library))
    async with http.get(f"{url}/api/tags") as answer:
        (entry,) = (await answer.json())["models"]
    assert entry["name"] == entry["model"] == "demo:latest"
    assert entry["nodes"] == ["alpha", "beta"] and entry["capabilities"] == ["completion"]
    assert entry["details"]["parameter_size"] == "8.0B" and entry["details"]["families"] == ["llama"]
    async with http.head(f"{url}/api/tags") as answer:
        assert answer.status == 200
    async with http.post(f"{url}/api/show", json={"name": "demo"}) as answer:
        shown = await answer.json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["tokenizer.ggml.tokens"] is None
    assert shown["template"] == "T" and shown["capabilities"] == ["completion"]
    assert shown["parameters"].splitlines()[0].split() == ["temperature", "0.5"]
    async with http.post(f"{url}/api/show", json={"model": "demo", "verbose": True}) as answer:
        assert (await answer.json())["model_info"]["tokenizer.ggml.tokens"] == ["a", "b"]
    async with http.get(f"{url}/api/ps") as answer:
        (loaded,) = (await answer.json())["models"]
    assert loaded["nodes"] == ["alpha", "beta"] and loaded["size_vram"] == 1200 and loaded["size"] == 2000
    assert loaded["context_length"] == 2048 and loaded["expires_at"].endswith("Z")


async def test_pull_tells_its_progress(serve: Serve, http: ClientSession) -> None:
    steps = (
        {"status": "pulling manifest"},
        {"status": "pulling", "total": 9, "completed": 3},
        {"status": "success"},
    )
    url = await serve(parts(puller=ScriptedPuller(*steps)))
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        assert [json.loads(line) async for line in answer.content] == list(steps)
    async with http.post(f"{url}/api/pull", json={"model": "demo", "stream": False}) as answer:
        assert await answer.json() == {"status": "success"}
    url = await serve(parts(puller=ScriptedPuller(Refusal(Fault.NOT_FOUND, "no such repository"))))
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        assert answer.status == 404
    url = await serve(
        parts(puller=ScriptedPuller(steps[0], Refusal(Fault.UNAVAILABLE, "the network is down")))
    )
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        last = [json.loads(line) async for line in answer.content][-1]
    assert last == {"error": "the network is down", "code": 503}


async def test_what_needs_an_ollama_says_so(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    for path in ("/api/push", "/api/create"):
        async with http.post(url + path, json={"model": "demo"}) as answer:
            assert answer.status == 501 and "Ollama" in (await answer.json())["error"]
    async with http.post(f"{url}/api/blobs/sha256:{'0' * 64}", data=b"x") as answer:
        assert answer.status == 501
    async with http.post(f"{url}/api/blobs/nonsense", data=b"x") as answer:
        assert answer.status == 400


async def test_a_relayed_answer_that_breaks_off_ends_in_an_error_line(
    serve: Serve, http: ClientSession
) -> None:
    broken = Refusal(Fault.INTERRUPTED, "the Ollama on beta broke off its answer")
    answer = PlainRelayed(b'{"status":"one"}\n', broken, kind="application/x-ndjson")
    relay = ScriptedRelay(answer)
    url = await serve(parts(relay=relay))
    async with http.post(f"{url}/api/create", json={"model": "x", "from": "base:7b"}) as response:
        assert response.status == 200 and response.content_type == "application/x-ndjson"
        lines = (await response.text()).splitlines()
    assert lines[0] == '{"status":"one"}'
    assert "broke off" in json.loads(lines[1])["error"] and len(lines) == 2
    assert answer.closed == 1
    async with http.post(f"{url}/api/push", json={"name": "me/x"}) as response:
        await response.read()
    blob = f"/api/blobs/sha256:{'0' * 64}"
    async with http.post(url + blob, data=b"GGUF") as response:
        await response.read()
    assert [(path, model) for _, path, _, model in relay.sent] == [
        ("/api/create", "base:7b"),
        ("/api/push", "me/x"),
        (blob, ""),
    ]
    assert relay.sent[2][2] == b"GGUF"


async def test_a_relayed_answer_is_ended_when_its_caller_hangs_up(serve: Serve, http: ClientSession) -> None:
    answer = PlainRelayed(b"one\n")
    answer.hangs = True
    url = await serve(parts(relay=ScriptedRelay(answer)))
    async with http.post(f"{url}/api/push", json={"model": "x"}) as response:
        assert await response.content.readline() == b"one\n"
        assert not answer.closed
        response.close()
    await until(lambda: answer.closed)


async def test_create_without_an_ollama_is_a_second_name_with_words_of_its_own(
    serve: Serve, http: ClientSession
) -> None:
    library = PlainLibrary(model(params='{"top_k":1,"seed":2}'))
    url = await serve(parts(library=library))
    body = {"model": "brief", "from": "demo", "system": "Be brief.", "parameters": {"top_k": 3}}
    async with http.post(f"{url}/api/create", json=body) as answer:
        assert answer.status == 200 and answer.content_type == "application/x-ndjson"
        assert json.loads((await answer.read()).splitlines()[-1]) == {"status": "success"}
    assert library.copied == [("demo:latest", "brief", ())]
    assert library.told == Told("Be brief.", '{"top_k":3,"seed":2}', None)
    plain = {"name": "again", "from": "demo", "license": ["a", "b"], "stream": False}
    async with http.post(f"{url}/api/create", json=plain) as answer:
        assert await answer.json() == {"status": "success"}
    assert library.told == Told(None, None, "a\nb")
    for more in ({"template": "{{ .Prompt }}"}, {"files": {"a.gguf": "sha256:0"}}, {"quantize": "q4_0"}):
        async with http.post(f"{url}/api/create", json={**body, **more}) as answer:
            assert answer.status == 501 and "Ollama" in (await answer.json())["error"]
    for more, status in (
        ({"from": "none"}, 404),
        ({"parameters": {"top_k": "many"}}, 400),
        ({"system": "x" * 100_001}, 400),
        ({"model": ""}, 400),
    ):
        async with http.post(f"{url}/api/create", json={**body, **more}) as answer:
            assert answer.status == status, more
    assert len(library.copied) == 2


async def test_create_from_a_model_that_no_ollama_has_is_a_second_name(
    serve: Serve, http: ClientSession
) -> None:
    library = PlainLibrary(model(source="folder"), model("theirs:latest", source="ollama"))
    relay = ScriptedRelay(PlainRelayed(b'{"status":"success"}\n'))
    url = await serve(parts(library=library, relay=relay))
    for body, relayed in (
        ({"model": "brief", "from": "demo", "system": "Be brief."}, False),
        ({"model": "brief", "from": "theirs", "system": "Be brief."}, True),
        ({"model": "brief", "from": "demo", "template": "{{ .Prompt }}"}, True),
        # It may fetch it.
        ({"model": "brief", "from": "elsewhere"}, True),
        ({"name": "old", "modelfile": "FROM demo"}, True),
        ({"model": "odd", "from": 5}, True),
    ):
        before = len(relay.sent)
        async with http.post(f"{url}/api/create", json=body) as answer:
            assert answer.status == 200, body
            assert json.loads((await answer.read()).splitlines()[-1]) == {"status": "success"}
        assert len(relay.sent) - before == relayed, body
    assert library.copied == [("demo:latest", "brief", ())]


async def test_copy_and_delete(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model())
    url = await serve(parts(library=library))
    async with http.post(f"{url}/api/copy", json={"source": "demo", "destination": "mine"}) as answer:
        assert answer.status == 200 and await answer.read() == b""
    async with http.delete(f"{url}/api/delete", json={"model": "demo"}) as answer:
        assert answer.status == 200
    assert library.copied == [("demo", "mine", ())] and library.deleted == [("demo", ())]
    body = {"source": "demo", "destination": "mine", "nodes": ["alpha"]}
    async with http.post(f"{url}/api/copy", json=body) as answer:
        assert answer.status == 200
    async with http.delete(f"{url}/api/delete", json={"model": "demo", "nodes": ["beta"]}) as answer:
        assert answer.status == 200
    assert library.copied[1:] == [("demo", "mine", ("alpha",))] and library.deleted[1:] == [
        ("demo", ("beta",))
    ]
    async with http.delete(f"{url}/api/delete", json={"model": "demo", "nodes": "beta"}) as answer:
        assert answer.status == 400


async def test_openai_events_pass_unread_and_end_in_done(serve: Serve, http: ClientSession) -> None:
    odd = b'{"choices":[{"delta":{"content":"x"}}],  "odd": 1}'
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    service = ScriptedService(odd, thought)
    url = await serve(parts(service))
    body = {**CHAT, "stream": True, "max_completion_tokens": 5, "id_slot": 1, "tools": None}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        events = (await answer.read()).split(b"\n\n")
    assert events[0] == b"data: " + odd
    assert json.loads(events[1][6:])["choices"][0]["delta"] == {"reasoning_content": "hm", "reasoning": "hm"}
    assert events[2:] == [b"data: [DONE]", b""]
    sent = call_of(service)
    assert sent.path == "/v1/chat/completions" and sent.body["max_completion_tokens"] == 5
    assert "id_slot" not in sent.body and "tools" not in sent.body


async def test_openai_models(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(None, model("org/repo:q4")))
    async with http.get(f"{url}/v1/models") as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == ["org/repo:q4"]
    async with http.get(f"{url}/v1/models/org/repo:q4") as answer:
        assert (await answer.json())["object"] == "model"
    async with http.get(f"{url}/v1/models/none") as answer:
        assert answer.status == 404


async def test_pages_of_foreign_origin_are_refused(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"Origin": "http://evil.example"}) as answer:
        assert answer.status == 403 and "cors_origins" in (await answer.json())["error"]
    for origin in ("http://localhost:3000", url):
        async with http.post(f"{url}/api/chat", json=CHAT, headers={"Origin": origin}) as answer:
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == origin
    asked = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with http.options(f"{url}/api/chat", headers=asked) as answer:
        assert answer.status == 204 and "POST" in answer.headers["Access-Control-Allow-Methods"]


async def test_request_ids(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Request-Id": "mine-1"}) as answer:
        assert answer.headers["X-Request-Id"] == "mine-1"
    assert service.asks[-1].id.startswith("mine-1.")
    async with http.get(f"{url}/api/version", headers={"X-Request-Id": "not sane"}) as answer:
        assert answer.headers["X-Request-Id"] != "not sane"


async def test_browsers_get_the_dashboard(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url, headers={"Accept": "text/html,*/*"}) as answer:
        page = await answer.text()
        assert answer.content_type == "text/html" and "sollold" in page
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page
    for name in ("dashboard.css", "dashboard.js"):
        assert f"/web/{name}" in page
        async with http.get(f"{url}/web/{name}") as answer:
            assert answer.status == 200 and len(await answer.text()) > 1000
    async with http.get(f"{url}/web/..%2fapp.py") as answer:
        assert answer.status == 404


async def test_the_cluster_is_shown(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(), record("1" * 16, "beta", endpoints=(endpoint(id="o", loaded=False),)))
    service = ScriptedService(chunk("a"), asyncio.Event())
    url = await serve(parts(service, cluster=cluster))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
        async with http.get(f"{url}/api/cluster") as shown:
            state = await shown.json()
    assert state["open"] is True and state["term"] == 3 and state["leader_name"] == "alpha"
    assert [node["name"] for node in state["nodes"]] == ["alpha", "beta"]
    assert state["nodes"][0]["leader"] and state["nodes"][0]["devices"][0]["granted"] == 100
    (found,) = state["deployments"]
    assert [(one["node_name"], one["first"], one["last"]) for one in found["placed"]] == [
        ("alpha", 0, 2),
        ("beta", 2, 5),
    ]
    (live,) = state["requests"]
    assert (live["model"], live["stage"], live["node"], live["events"]) == ("demo", "answering", "beta", 1)


async def test_the_route_of_a_model_that_no_node_has_is_told_where_the_settings_know_of_it(
    serve: Serve, http: ClientSession
) -> None:
    class Foreseeing(PlainCluster):
        async def plan(self, ask: PlanAsk) -> Planned:
            if ask.model != "big:1t":
                raise Refusal(Fault.NOT_FOUND, f"model {ask.model!r} not found")
            return Planned(True, "it would be spread")

    url = await serve(parts(cluster=Foreseeing()))
    async with http.post(f"{url}/api/cluster/route", json={"model": "big:1t"}) as answer:
        assert await answer.json() == {"model": "big:1t", "nodes": [], "endpoints": []}
    async with http.post(f"{url}/api/cluster/route", json={"model": "nowhere"}) as answer:
        assert answer.status == 404


async def test_the_cluster_is_commanded(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    url = await serve(parts(cluster=cluster))
    async with http.post(
        f"{url}/api/cluster/plan", json={"model": "demo", "context": 4096, "kv": "q8_0"}
    ) as answer:
        assert (await answer.json())["ok"] is True
    assert (cluster.asked[-1].context, cluster.asked[-1].type_k, cluster.asked[-1].type_v) == (
        4096,
        "q8_0",
        "q8_0",
    )
    async with http.post(f"{url}/api/cluster/load", json={"model": "demo", "keep_alive": "-1"}) as answer:
        assert (await answer.json())["deployment"] == "d1"
    assert cluster.asked[-1].keep_alive == -1
    async with http.post(f"{url}/api/cluster/unload", json={"model": "demo", "force": True}) as answer:
        assert await answer.json() == {"unloaded": 1}
    async with http.post(f"{url}/api/cluster/drain", json={"on": False}) as answer:
        assert (await answer.json())["draining"] is False
    assert cluster.asked[-2:] == [("unload", "demo", True), ("drain", "", False)]
    async with http.post(f"{url}/api/cluster/scan") as answer:
        (worker,) = (await answer.json())["workers"]
    assert (worker["address"], worker["state"], worker["named"]) == ("10.0.0.9:50052", "usable", False)
    async with http.post(f"{url}/api/cluster/route", json={"model": "demo"}) as answer:
        assert (await answer.json())["endpoints"][0]["why"] == "ready, nothing in line"
    for wrong in ({"policy": "odd"}, {"slots": MOST_SLOTS + 1}):
        async with http.post(f"{url}/api/cluster/plan", json={"model": "demo", **wrong}) as answer:
            assert answer.status == 400
            assert next(iter(wrong)) in (await answer.json())["error"]


def test_a_shared_memory_counts_once_for_a_node() -> None:
    gpu = Device("Vulkan0", Kind.GPU, "Iris", 8 * GIB, 6 * GIB, 8 * GIB, 2 * GIB, 5 * GIB, pool="ram")
    ram = replace(gpu, id="CPU", kind=Kind.CPU, granted=GIB)
    card = Device("CUDA0", Kind.GPU, "RTX", 4 * GIB, 4 * GIB, 4 * GIB, 0, 4 * GIB)
    node = node_object(replace(record(), devices=(gpu, ram, card)), "", "")
    assert (node["total"], node["granted"], node["available"]) == (12 * GIB, 3 * GIB, 9 * GIB)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 beside IPv4 here")
async def test_every_address_means_both_kinds(http: ClientSession) -> None:
    facts = HttpSettings(host="::", port=0)
    listener = Listener(build_app(parts(), facts), facts, drain=0.2)
    await listener.start()
    try:
        for host in ("127.0.0.1", "[::1]"):
            async with http.get(f"http://{host}:{listener.port}/") as answer:
                assert answer.status == 200
    finally:
        await listener.close()


async def test_metrics(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(chunk(finish="stop"))))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.read()
    async with http.post(f"{url}/v1/chat/completions", json={}) as answer:
        assert answer.status == 400
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    assert 'sollold_http_requests_total{dialect="ollama",status="200"} 1.0' in text
    assert 'sollold_http_requests_total{dialect="openai",status="400"} 1.0' in text
    assert 'sollold_device_bytes{device="CPU",kind="granted"} 100.0' in text
    assert "sollold_endpoint_ready" in text


async def test_every_route_is_described(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/openapi.json") as answer:
        described = await answer.json()
    paths = described["paths"]
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/api/cluster", "/v1/models/{model}"):
        assert path in paths
    names = set(described["components"]["schemas"])
    text = json.dumps(paths)
    assert (
        all(f'"#/components/schemas/{name}"' in text for name in ("Chat", "Messages"))
        and "Error_openai" in names
    )


PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 9},
    "/v1/responses": {"model": "demo", "input": "hi"},
}


@pytest.mark.parametrize("path", PATHS)
async def test_server_sent_events_say_in_a_comment_that_the_answer_was_resumed(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService(
        chunk(None, role="assistant"), chunk("Hel"), Resumed(1500.0), chunk("lo"), chunk(finish="stop")
    )
    url = await serve(parts(service))
    async with http.post(f"{url}{path}", json={**PATHS[path], "stream": True}) as answer:
        body = await answer.text()
    before, comment, after = body.partition(": resumed: 1 times, without words for 1500 ms in all\n\n")
    assert comment and "Hel" in before and "lo" in after


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_an_answer_that_nobody_saw_yet_begins_anew(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService(
        chunk("of no use"), Resumed(20.0), b"", chunk("Hello"), chunk(finish="stop"), usage_chunk()
    )
    url = await serve(parts(service))
    async with http.post(f"{url}{path}", json=PATHS[path]) as answer:
        assert answer.status == 200
        assert answer.headers["X-Sollold-Resumed"] == "1" and answer.headers["X-Sollold-Gap-Ms"] == "20"
        body = await answer.text()
    assert service.asks[-1].gathered
    assert "Hello" in body and "of no use" not in body
    async with http.post(f"{url}{path}", json={**PATHS[path], "stream": True}) as answer:
        await answer.read()
    assert not service.asks[-1].gathered
