"""Streamed answers: errors, keepalives, disconnections, resumed answers, memory of request bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession
from anthropic import AnthropicError, AsyncAnthropic
from openai import APIError, AsyncOpenAI

from sollold.api.http.response import KeepAlive
from sollold.errors import Fault, Refusal
from sollold.serving.request import Waiting
from tests.api.api_parts import (
    CHAT,
    Resumed,
    ScriptedService,
    call_of,
    chunk,
    model,
    parts,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.doubles import until

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 9},
    "/v1/responses": {"model": "demo", "input": "hi"},
}


async def test_an_error_in_a_stream_is_its_last_event(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), Refusal(Fault.INTERRUPTED, "the worker died"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        lines = [json.loads(line) async for line in answer.content]
    assert answer.status == 200
    assert lines[-1] == {"error": "the worker died", "code": 502}
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        text = await answer.text()
    assert (
        json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"]
        == "the worker died"
    )
    assert "[DONE]" not in text


async def test_a_failed_response_stream_has_both_failed_and_error_events(
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


async def test_a_response_stream_reports_that_its_input_is_too_long(
    serve: Serve, http: ClientSession
) -> None:
    """Codex shortens the conversation only after such an event: after a 400 it fails at each further turn."""
    service = ScriptedService()
    text = "request (9000 tokens) exceeds the available context size (2048 tokens)"
    service.refusal = Refusal(Fault.ENGINE, text, status=400)
    url = await serve(parts(service))
    body = {"model": "demo", "input": "hi", "stream": True}
    async with http.post(f"{url}/v1/responses", json=body) as answer:
        assert answer.status == 200
        text = await answer.text()
    events = [json.loads(part.split("data: ")[1]) for part in text.strip().split("\n\n")]
    kinds = ["response.created", "response.in_progress", "response.failed", "error"]
    assert [event["type"] for event in events] == kinds
    assert events[2]["response"]["error"]["code"] == events[3]["code"] == "context_length_exceeded"
    # LangChain looks for these words.
    assert "exceeds the context window" in events[3]["message"] and "9000" in events[3]["message"]
    async with http.post(f"{url}/v1/responses", json={**body, "stream": False}) as answer:
        assert answer.status == 400
    service.refusal = Refusal(Fault.ENGINE, "no such grammar", status=400)
    async with http.post(f"{url}/v1/responses", json=body) as answer:
        assert answer.status == 400


async def test_an_unexpected_exception_is_not_shown_to_clients(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), ValueError("secret inside"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        text = await answer.text()
    assert "secret" not in text
    assert "error" in json.loads(text.splitlines()[-1])


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(Fault.TOO_BIG, "it does not fit"),
        Refusal(Fault.ENGINE, "boom", status=500),
        Refusal(Fault.INTERRUPTED, "it was unloaded with --force", final=True),
    ],
)
async def test_client_libraries_do_not_retry_permanent_errors(serve: Serve, refusal: Refusal) -> None:
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


async def test_errors_before_the_first_byte_have_their_status(serve: Serve, http: ClientSession) -> None:
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


async def test_keepalives_while_waiting_for_the_model(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("ok"), chunk(finish="stop"), usage_chunk())
    service.gate = asyncio.Event()
    service.waitings = [Waiting("loading", 0.43)]
    url = await serve(parts(service), KeepAlive(grace=0.02, every=0.02))
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


async def test_keepalives_during_a_stream(serve: Serve, http: ClientSession) -> None:
    proceed = asyncio.Event()
    service = ScriptedService(chunk("a"), proceed, chunk("b"))
    url = await serve(parts(service), KeepAlive(grace=1, every=0.02))
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert b"a" in await answer.content.readline()
        await answer.content.readline()
        assert (await answer.content.readline()).startswith(b": ")
        proceed.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "before", "during"),
    [
        ("/v1/messages", ["ping", "message_start"], ["content_block_delta", "ping"]),
        (
            "/v1/responses",
            ["response.created", "response.in_progress"],
            ["response.output_text.delta", "response.in_progress"],
        ),
    ],
)
async def test_keepalives_are_events_where_the_dialect_has_one(
    serve: Serve, http: ClientSession, path: str, before: list[str], during: list[str]
) -> None:
    proceed = asyncio.Event()
    service = ScriptedService(chunk("a"), proceed, chunk("b"), chunk(finish="stop"), usage_chunk())
    service.gate = asyncio.Event()
    service.waitings = [Waiting("loading", 0.43)]
    url = await serve(parts(service), KeepAlive(grace=0.02, every=0.02))
    types: list[str] = []
    async with http.post(url + path, json={**PATHS[path], "stream": True}) as answer:
        async for line in answer.content:
            if line.startswith(b"event: "):
                types.append(line[7:].decode().strip())
            if before[0] in types:
                service.gate.set()
            if types[-2:] == during:
                proceed.set()
    distinct = list(dict.fromkeys(types))
    assert proceed.is_set() and distinct[:2] == before
    assert types.count(before[1]) == 1 or before[1] == during[1]
    assert types.count("response.created") <= 1
    assert types[-1] in ("message_stop", "response.completed")


async def test_keepalives_show_the_current_stage(serve: Serve, http: ClientSession) -> None:
    proceed = asyncio.Event()
    service = ScriptedService(
        chunk("a"), Waiting("recovering"), Resumed(5.0), chunk("b"), proceed, chunk("c")
    )
    service.waitings = [Waiting("loading", 0.96)]
    url = await serve(parts(service), KeepAlive(grace=1, every=0.02))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        content = ""
        while content != "ab":
            content += json.loads(await answer.content.readline())["message"]["content"]
        async with http.get(f"{url}/api/cluster") as cluster:
            assert [request["stage"] for request in (await cluster.json())["requests"]] == ["answering"]
        assert json.loads(await answer.content.readline())["_waiting"] == "answering"
        proceed.set()
        await answer.read()


async def test_a_disconnection_cancels_the_request(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), asyncio.Event())
    service.gate = asyncio.Event()
    url = await serve(parts(service), KeepAlive(grace=0.01, every=0.01))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
    await until(lambda: service.cancelled == 1)
    service.gate.set()
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
    await until(lambda: service.closed == 1)
    # Also without streaming.
    service.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await http.post(f"{url}/api/chat", json={**CHAT, "stream": False})
    await until(lambda: service.cancelled == 2)


async def test_a_client_that_does_not_read_is_disconnected(serve: Serve) -> None:
    service = ScriptedService(*[chunk("x" * 100_000)] * 500)
    url = await serve(parts(service), KeepAlive(grace=1, every=0.02, unread=0.2))
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1024)
    body = msgspec.json.encode(CHAT)
    writer.write(
        f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    # The engine's slot is released.
    await until(lambda: service.closed == 1)
    writer.close()


async def test_bodies_of_waiting_requests_are_bounded_and_released(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService({"choices": []})
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=5000)
    body = {"model": "demo", "messages": [{"role": "user", "content": "x" * 3000}], "stream": False}

    async def post(path: str, data: Any) -> tuple[int, str, dict[str, Any]]:
        async with http.post(url + path, data=data) as answer:
            refusal = await answer.json(content_type=None)
            return answer.status, answer.headers.get("Retry-After", ""), refusal

    async def in_pieces(raw: bytes) -> AsyncIterator[bytes]:
        yield raw

    raw = msgspec.json.encode(body)
    waiting = asyncio.create_task(post("/api/chat", raw))
    await until(lambda: service.asks)
    status, after, refusal = await post("/v1/chat/completions", raw)
    assert (status, after) == (503, "5") and "memory" in refusal["error"]["message"]
    # Also a body of unknown length.
    status, after, refusal = await post("/api/chat", in_pieces(raw))
    assert (status, after) == (503, "5") and "memory" in refusal["error"]
    service.gate.set()
    assert (await waiting)[0] == 200
    for _ in range(3):
        assert (await post("/api/chat", raw))[0] == 200


async def test_a_body_of_unknown_length_is_counted_while_it_arrives(
    serve: Serve, http: ClientSession
) -> None:
    service = ScriptedService({"choices": []})
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=5000)

    async def endless() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
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
    # A body of unknown length is accepted if it is the only one, also in pieces.
    reader, writer = await endless()
    body = msgspec.json.encode({**CHAT, "stream": False})
    for piece in (body[:20], body[20:], b""):
        await writer.drain()
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    async with asyncio.timeout(5):
        assert b" 200 " in await reader.readline()
    writer.close()


async def test_openai_events_are_passed_on_and_end_in_done(serve: Serve, http: ClientSession) -> None:
    unusual = b'{"choices":[{"delta":{"content":"x"}}],  "odd": 1}'
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    service = ScriptedService(unusual, thought)
    url = await serve(parts(service))
    body = {**CHAT, "stream": True, "max_completion_tokens": 5, "id_slot": 1, "tools": None}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        events = (await answer.read()).split(b"\n\n")
    assert events[0] == b"data: " + unusual
    assert json.loads(events[1][6:])["choices"][0]["delta"] == {"reasoning_content": "hm", "reasoning": "hm"}
    assert events[2:] == [b"data: [DONE]", b""]
    sent = call_of(service)
    assert sent.path == "/v1/chat/completions" and sent.body["max_completion_tokens"] == 5
    assert "id_slot" not in sent.body and "tools" not in sent.body


async def test_openai_models(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(None, model("org/repo:q4")))
    async with http.get(f"{url}/v1/models") as answer:
        assert [shown["id"] for shown in (await answer.json())["data"]] == ["org/repo:q4"]
    async with http.get(f"{url}/v1/models/org/repo:q4") as answer:
        assert (await answer.json())["object"] == "model"
        assert (await answer.json())["id"] == "org/repo:q4"
    async with http.get(f"{url}/v1/models/none") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("name", ["demo", "demo:latest"])
async def test_a_single_model_has_the_requested_name(serve: Serve, http: ClientSession, name: str) -> None:
    async with http.get(f"{await serve(parts())}/v1/models/{name}") as answer:
        assert (await answer.json())["id"] == name


@pytest.mark.parametrize("path", PATHS)
async def test_a_resumed_event_stream_has_a_comment(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService(
        chunk(None, role="assistant"), chunk("Hel"), Resumed(1500.0), chunk("lo"), chunk(finish="stop")
    )
    url = await serve(parts(service))
    async with http.post(f"{url}{path}", json={**PATHS[path], "stream": True}) as answer:
        body = await answer.text()
    before, comment, after = body.partition(": resumed: 1 times, 1500 ms without output in total\n\n")
    assert comment and "Hel" in before and "lo" in after


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_a_whole_answer_that_is_resumed_starts_again(
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


@pytest.mark.parametrize("connection", ["keep-alive", "close", ""])
async def test_a_stream_over_http_1_0_ends_with_its_connection(serve: Serve, connection: str) -> None:
    url = await serve(parts(ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())))
    body = msgspec.json.encode(CHAT)
    head = [b"POST /api/chat HTTP/1.0", b"Host: localhost", b"Content-Length: %d" % len(body)]
    head += [b"Connection: " + connection.encode()] if connection else []
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    assert b"chunked" not in answer.lower() and b"connection: keep-alive" not in answer.lower()
    assert json.loads(answer.splitlines()[-1])["done"] is True


async def test_options_of_the_whole_server(serve: Serve) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    async with asyncio.timeout(5):
        assert b" 204 " in await reader.readline()
    writer.close()
