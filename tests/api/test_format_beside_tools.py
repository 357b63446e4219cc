"""Structured output together with tools: tools can be called, and a text has the format."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, tools_of
from tests.api.reciters import TOOL

USER = [{"role": "user", "content": "go"}]
TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))
SCHEMA = {
    "type": "object",
    "properties": {"tall": {"type": "boolean"}},
    "required": ["tall"],
    "additionalProperties": False,
}
NAMED = {"name": "answer", "schema": SCHEMA}
FORMATS: dict[str, dict[str, Any]] = {
    "/api/chat": {"format": SCHEMA},
    "/v1/chat/completions": {"response_format": {"type": "json_schema", "json_schema": NAMED}},
    "/v1/responses": {"text": {"format": {"type": "json_schema", **NAMED}}},
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}
CALL = {"index": 0, "id": "c1", "function": {"name": "get_time", "arguments": '{"zone": "utc"}'}}


class SequenceService(ScriptedService):
    """Plays the next of its answers for each request."""

    def __init__(self, *answers: list[Any]) -> None:
        super().__init__()
        self.answers = list(answers)

    async def open(self, ask: Any, on_wait: Any) -> Any:
        self.events = tuple(self.answers.pop(0))
        return await super().open(ask, on_wait)

    def sent(self) -> list[tuple[bool, Any]]:
        """For each request whether it had a format, and its tool choice."""
        bodies = [ask.calls[Engine.LLAMA].body for ask in self.asks]
        return [("response_format" in body, body.get("tool_choice")) for body in bodies]


def request_body(path: str, **more: Any) -> dict[str, Any]:
    return body_of(path, "demo", USER, stream=True, tools=tools_of(path, TOOL), **FORMATS[path], **more)


async def read(http: ClientSession, url: str, body: dict[str, Any]) -> str:
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.text()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reasoning", ["", "I think"])
async def test_a_tool_can_be_called_despite_a_format(
    serve: Serve, http: ClientSession, path: str, reasoning: str
) -> None:
    """Agents with typed output do this (OpenAI's Agents SDK, Pydantic AI)."""
    thinks = [chunk(reasoning_content=reasoning)] if reasoning else []
    service = SequenceService([*thinks, chunk(tool_calls=[CALL]), chunk(finish="tool_calls"), usage_chunk()])
    url = await serve(parts(service, TOOL_MODEL))
    assert "get_time" in await read(http, url + path, request_body(path))
    ((formed, _),) = service.sent()
    assert not formed


@pytest.mark.parametrize("path", PATHS)
async def test_a_text_has_the_format(serve: Serve, http: ClientSession, path: str) -> None:
    free = [chunk(reasoning_content="I"), chunk("Well"), chunk(" then"), chunk(finish="stop")]
    formed = [chunk('{"tall"'), chunk(": true}"), chunk(finish="stop"), usage_chunk()]
    service = SequenceService(free, formed)
    url = await serve(parts(service, TOOL_MODEL))
    text = await read(http, url + path, request_body(path))
    assert "Well" not in text and "true" in text
    assert service.sent() == [(False, service.sent()[0][1]), (True, "none")]
    # The first answer was closed before the second request.
    assert service.closed >= 1


@pytest.mark.parametrize(
    ("more", "sent"),
    [
        ({"tool_choice": "required"}, [(False, "required")]),
        ({"tool_choice": "none"}, [(True, "none")]),
        ({"response_format": {"type": "text"}}, [(True, None)]),
        ({"tools": []}, [(True, None)]),
    ],
)
async def test_two_requests_are_made_only_for_a_format_with_optional_tools(
    serve: Serve, http: ClientSession, more: dict[str, Any], sent: Any
) -> None:
    service = SequenceService([chunk(tool_calls=[CALL]), chunk(finish="tool_calls"), usage_chunk()])
    url = await serve(parts(service, TOOL_MODEL))
    path = "/v1/chat/completions"
    await read(http, url + path, {**request_body(path), **more})
    assert service.sent() == sent


def native(**message: Any) -> dict[str, Any]:
    return {"model": "demo", "message": {"role": "assistant", "content": "", **message}, "done": False}


DONE = {**native(), "done": True, "done_reason": "stop"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("calls", [True, False])
async def test_ollama_gets_two_requests_too(
    serve: Serve, http: ClientSession, path: str, calls: bool
) -> None:
    function = {"name": "get_time", "arguments": {"zone": "utc"}}
    if path == "/api/chat":
        free = [native(thinking="I"), native(tool_calls=[{"function": function}]), DONE]
        text, formed = [native(content="Well"), DONE], [native(content='{"tall": true}'), DONE]
    else:
        free = [chunk(reasoning="I"), chunk(tool_calls=[CALL]), chunk(finish="tool_calls"), usage_chunk()]
        text = [chunk("Well"), chunk(finish="stop"), usage_chunk()]
        formed = [chunk('{"tall": true}'), chunk(finish="stop"), usage_chunk()]
    service = SequenceService(free) if calls else SequenceService(text, formed)
    service.engine = Engine.OLLAMA
    url = await serve(parts(service, TOOL_MODEL))
    output = await read(http, url + path, request_body(path))
    assert ("get_time" in output) if calls else ("tall" in output and "Well" not in output)
    bodies = [ask.calls[Engine.OLLAMA].body for ask in service.asks]
    sent = [(bool(body.get("format") or body.get("response_format")), "tools" in body) for body in bodies]
    assert sent == ([(False, True)] if calls else [(False, True), (True, False)])


def token_limit(path: str) -> dict[str, Any]:
    """The field that limits an answer to 60 tokens."""
    limits: dict[str, dict[str, Any]] = {
        "/api/chat": {"options": {"num_predict": 60}},
        "/v1/responses": {"max_output_tokens": 60},
    }
    return limits.get(path, {"max_tokens": 60})


@pytest.mark.llama
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_calls_a_tool_beside_a_format(
    real: str, http: ClientSession, path: str, stream: bool
) -> None:
    body = {**request_body(path), "model": "call", "stream": stream, **token_limit(path)}
    assert "get_time" in await read(http, real + path, body)


@pytest.mark.llama
@pytest.mark.clients
@pytest.mark.parametrize("path", PATHS)
async def test_ollama_calls_a_tool_beside_a_format(at_ollama: str, http: ClientSession, path: str) -> None:
    body = {**request_body(path), "model": "call", **token_limit(path)}
    assert "get_time" in await read(http, at_ollama + path, body)
