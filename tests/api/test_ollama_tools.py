"""Tools for Ollama, which accepts only a part of JSON Schema."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.calls import ollama_body
from sollold.api.engine.ollama_tools import readable_tools
from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, text_service, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, post, status_of, tools_of

USER = [{"role": "user", "content": "go"}]
UNUSUAL_SCHEMA: dict[str, Any] = {
    "type": ["object"],
    "required": None,
    "properties": {
        "any": True,
        "none": None,
        "kinds": {"type": ["string", "null"], "description": "d"},
        "odd": {"type": {"x": 1}, "description": 5, "enum": "a"},
        "either": {"anyOf": [{"type": "string"}, True]},
        "inner": {"type": "object", "properties": {"x": True}, "required": ["x", 5]},
        "list": {"type": "array", "items": {"type": "string"}},
    },
}
READABLE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "any": {},
        "none": {},
        "kinds": {"type": ["string", "null"], "description": "d"},
        "odd": {"description": "5", "enum": ["a"]},
        "either": {"anyOf": [{"type": "string"}, {}]},
        "inner": {"type": "object", "properties": {"x": {}}, "required": ["x"]},
        "list": {"type": "array", "items": {"type": "string"}},
    },
}


def tool(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get", "description": "d", "parameters": schema}}


@pytest.mark.parametrize("path", PATHS)
async def test_schemas_are_reduced_to_what_ollama_reads(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    body = body_of(path, "demo", USER, stream=True, tools=tools_of(path, tool(UNUSUAL_SCHEMA)))
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
    (sent,) = call_of(service, Engine.OLLAMA).body["tools"]
    assert sent["function"]["parameters"] == READABLE_SCHEMA
    # llama-server gets the whole schema and enforces what it can.
    (sent_to_llama,) = call_of(service).body["tools"]
    assert (
        sent_to_llama["function"]["parameters"]["properties"]["list"] == READABLE_SCHEMA["properties"]["list"]
    )


def test_deeply_nested_schemas_are_handled() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        deep = {"type": "object", "properties": {"x": deep}}
    assert readable_tools([tool(deep)])


def test_missing_parameters_become_an_empty_object() -> None:
    """Ollama makes missing parameters null, which its engine refuses."""
    bare = {"type": "function", "function": {"name": "get", "description": "d"}}
    nothing = tool({"type": "object", "properties": {}})
    assert readable_tools([bare, tool(None), tool({}), tool({"type": "object"})]) == [nothing] * 4
    assert readable_tools([tool("odd")]) == [tool("odd")]


@pytest.mark.llama
@pytest.mark.clients
@pytest.mark.parametrize("path", PATHS)
async def test_ollama_accepts_reduced_schemas(at_ollama: str, http: ClientSession, path: str) -> None:
    body = body_of(
        path, "call", USER, tools=tools_of(path, tool({"type": "object", "properties": {"a": True}}))
    )
    status, answer, _ = await post(http, at_ollama + path, body)
    assert status == 200, answer


@pytest.mark.parametrize(
    "tools", ["/etc/passwd", 7, {"a": 1}, [1, None, "x"], [{}], [{"function": "f"}], [{"function": None}]]
)
def test_invalid_tools_are_left_unchanged(tools: Any) -> None:
    """Embeddings and completions have no tools; a field of this name must not cause an error."""
    assert readable_tools(tools) == tools
    assert ollama_body({"input": "a", "tools": tools})["tools"] == tools


@pytest.mark.parametrize(
    ("path", "none", "required", "notes"),
    [
        (
            "/v1/chat/completions",
            "none",
            {"tool_choice": "required", "parallel_tool_calls": False, "top_k": 5},
            ("top_k", "tool_choice", "parallel_tool_calls"),
        ),
        (
            "/v1/responses",
            "none",
            {"tool_choice": "required", "parallel_tool_calls": False},
            ("tool_choice", "parallel_tool_calls"),
        ),
        (
            "/v1/messages",
            {"type": "none"},
            {
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
                "top_k": 5,
                "thinking": {"type": "enabled", "budget_tokens": 2000},
            },
            ("top_k", "thinking.budget_tokens", "tool_choice", "tool_choice.disable_parallel_tool_use"),
        ),
    ],
)
async def test_an_ollama_gets_no_tools_that_must_not_be_called_and_other_choices_warn(
    serve: Serve, http: ClientSession, path: str, none: Any, required: dict[str, Any], notes: tuple[str, ...]
) -> None:
    """An Ollama ignores a tool_choice."""
    service = text_service()
    url = await serve(parts(service, model(capabilities=("completion", "tools", "thinking"))))
    body = body_of(path, "demo", USER, stream=True, tools=tools_of(path, tool({"type": "object"})))
    assert await status_of(http, url + path, {**body, "tool_choice": none}) == 200
    assert "tools" not in call_of(service, Engine.OLLAMA).body and call_of(service).body["tools"]
    assert call_of(service, Engine.OLLAMA).notes == ()
    assert await status_of(http, url + path, {**body, **required}) == 200
    assert call_of(service, Engine.OLLAMA).notes == tuple(
        f"{name} has no effect: an Ollama answers" for name in notes
    )
