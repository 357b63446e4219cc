"""Large schemas are rewritten in a thread, so that other requests don't wait."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine import prepare
from sollold.api.grammar.schema import convert_schema
from tests.api.api_parts import CHAT, ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve

LARGE: dict[str, Any] = {
    "type": "object",
    "properties": {
        f"p{n}": {
            "allOf": [{"$ref": "#/$defs/a"}],
            "type": "object",
            "properties": {"q": {"type": "string", "description": "x" * 200}},
        }
        for n in range(400)
    },
    "$defs": {"a": {"type": "object"}},
}
SMALL = {"type": "object", "properties": {"a": {"type": "string", "minLength": 2}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": LARGE}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": LARGE}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Ollama's format": ("/api/chat", {**CHAT, "format": LARGE}),
    "Ollama's tools": ("/api/chat", {**CHAT, "tools": [FUNCTION]}),
    "a prompt": ("/api/generate", {"model": "demo", "prompt": "a", "format": LARGE}),
    "OpenAI's format": ("/v1/chat/completions", {**CHAT, "stream": True, "response_format": NAMED}),
    "a completion": (
        "/v1/completions",
        {"model": "demo", "prompt": "a", "stream": True, "json_schema": LARGE},
    ),
    "a response": (
        "/v1/responses",
        {
            "model": "demo",
            "input": "a",
            "stream": True,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": LARGE}},
        },
    ),
    "Anthropic's tools": (
        "/v1/messages",
        {**CHAT, "max_tokens": 5, "stream": True, "tools": [{"name": "f", "input_schema": LARGE}]},
    ),
}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of the threads that convert schemas."""
    thread_ids: set[int] = set()
    convert = convert_schema

    def recording(*arguments: Any, **more: Any) -> Any:
        thread_ids.add(threading.get_ident())
        return convert(*arguments, **more)

    monkeypatch.setattr(prepare, "convert_schema", recording)
    return thread_ids


@pytest.mark.parametrize("case", BODIES)
async def test_a_large_schema_is_not_rewritten_on_the_loop(
    serve: Serve, http: ClientSession, threads: set[int], case: str
) -> None:
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    path, body = BODIES[case]
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
    assert threads and threading.get_ident() not in threads
    assert call_of(service).body


async def test_a_small_schema_is_rewritten_on_the_loop(
    serve: Serve, http: ClientSession, threads: set[int]
) -> None:
    """A thread would take longer. A long conversation doesn't matter."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    text = "".join(random.Random(1).choices("abc ", k=100_000))
    for messages in (CHAT["messages"], [{"role": "user", "content": text}]):
        async with http.post(
            f"{url}/api/chat", json={"model": "demo", "messages": messages, "format": SMALL}
        ) as answer:
            assert answer.status == 200
    assert threads == {threading.get_ident()}


async def test_several_large_schemas_are_rewritten_in_the_same_thread(
    serve: Serve, http: ClientSession, threads: set[int]
) -> None:
    """Each computing thread can hold the GIL for 5 ms at a time."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model()))

    async def ask() -> int:
        async with http.post(f"{url}/api/chat", json={**CHAT, "format": LARGE}) as answer:
            await answer.read()
            return answer.status

    assert {*await asyncio.gather(*(ask() for _ in range(6)))} == {200}
    assert len(threads) == 1 and threading.get_ident() not in threads
