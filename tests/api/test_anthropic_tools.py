"""Tools of ``/v1/messages`` that Anthropic defines, and failed tool results."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, call_of, model, parts, text_service
from tests.api.conftest import Serve
from tests.api.dialects import post

TOOL_MODEL = model(capabilities=("completion", "tools"))
PATH = "/v1/messages"
ASK: dict[str, Any] = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "go"}]}
READ = {"name": "Read", "description": "Reads.", "input_schema": {"type": "object", "properties": {}}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
FIND = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_that_run_at_anthropic_are_left_out_with_a_warning(
    serve: Serve, http: ClientSession, stream: bool
) -> None:
    """Claude Code offers a web search; its request can be answered without one."""
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    body = {**ASK, "stream": stream, "tools": [READ, SEARCH, FIND]}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200 and "web_search_20250305" in answer.headers["X-Sollold-Warning"]
    for engine in Engine:
        call = call_of(service, engine)
        assert [tool["function"]["name"] for tool in call.body["tools"]] == ["Read"]
    assert any("web_search" in note for note in call_of(service, Engine.OLLAMA).notes)
    status, _, _ = await post(http, url, {**ASK, "tools": [SEARCH], "tool_choice": {"type": "auto"}})
    assert (
        status == 200 and "tools" not in call_of(service).body and "tool_choice" not in call_of(service).body
    )


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
async def test_a_model_without_tools_answers_if_only_anthropics_tools_are_offered(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService({"input_tokens": 5}) if "count" in path else text_service("Hello")
    url = await serve(parts(service)) + path
    assert (await post(http, url, {**ASK, "tools": [SEARCH]}))[0] == 200


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([SEARCH], {"type": "tool", "name": "web_search"}, "web_search"),
        ([READ, SEARCH], {"type": "tool", "name": "web_search"}, "runs at Anthropic"),
        ([SEARCH], {"type": "any"}, "run at Anthropic"),
        ([READ], {"type": "tool", "name": "Write"}, "not among the tools"),
        ([READ], {"type": "sometimes"}, "tool_choice.type"),
        ([{"description": "x"}], None, "name"),
        ([{"name": "x", "input_schema": "text"}], None, "'x'"),
    ],
)
async def test_invalid_tools_and_required_tools_that_are_missing_are_refused(
    serve: Serve, http: ClientSession, tools: Any, choice: Any, message: str
) -> None:
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    status, answer, _ = await post(http, url, {**ASK, "tools": tools, "tool_choice": choice})
    assert status == 400 and message in answer["error"]["message"]
    assert not service.asks


@pytest.mark.parametrize(
    ("kind", "name", "argument"),
    [
        ("bash_20250124", "bash", "restart"),
        ("text_editor_20250728", "str_replace_based_edit_tool", "old_str"),
        ("memory_20250818", "memory", "old_path"),
        ("computer_20250124", "computer", "coordinate"),
    ],
)
async def test_anthropics_client_tools_get_their_schemas(
    serve: Serve, http: ClientSession, kind: str, name: str, argument: str
) -> None:
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    tool = {"type": kind, "name": name, "cache_control": {"type": "ephemeral"}, "display_width_px": 800}
    status, _, headers = await post(http, url, {**ASK, "tools": [tool]})
    assert status == 200 and "X-Sollold-Warning" not in headers
    (tool_sent,) = call_of(service).body["tools"]
    assert tool_sent["function"]["name"] == name and tool_sent["function"]["description"]
    assert argument in tool_sent["function"]["parameters"]["properties"]


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["bash_20250124", "text_editor_20250728"])
async def test_llama_cpp_accepts_anthropics_tools(real: str, http: ClientSession, kind: str) -> None:
    tools = [{"type": kind, "name": "edit"}, SEARCH]
    status, answer, _ = await post(http, real + PATH, {**ASK, "model": "call", "tools": tools})
    assert status == 200, answer


PDF = {
    "type": "document",
    "title": "a.pdf",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="},
}


async def test_the_model_sees_a_documents_title_and_context_and_citations_warn(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    text = {"type": "text", "media_type": "text/plain", "data": "All is well."}
    note = {"type": "document", "title": "Report", "context": "from May", "source": text}
    content = [note, {**PDF, "context": "a scan", "citations": {"enabled": True}}]
    body = {**ASK, "messages": [{"role": "user", "content": content}], "stream": True}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200 and "citations has no effect" in answer.headers["X-Sollold-Warning"]
    seen = call_of(service).body["messages"][-1]["content"]
    assert seen.startswith("Report\nfrom May\nAll is well.\n") and seen.endswith("a scan")
    content[1] = {**PDF, "citations": {"enabled": False}}
    async with http.post(url, json=body) as answer:
        assert "citations" not in answer.headers["X-Sollold-Warning"]


@pytest.mark.parametrize("in_result", [True, False])
async def test_an_unreadable_document_is_left_out_with_a_warning(
    serve: Serve, http: ClientSession, in_result: bool
) -> None:
    """Claude Code sends a PDF that it has read again with each request."""
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Read", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [PDF] if in_result else "PDF read"}
    blocks = [result] if in_result else [result, PDF]
    turns = [*ASK["messages"], call, {"role": "user", "content": blocks}]
    body = {**ASK, "messages": turns, "tools": [READ], "stream": True}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200 and "document" in answer.headers["X-Sollold-Warning"]
    assert "(a.pdf) was left out" in call_of(service).body["messages"][-1]["content"]
    source: object
    for source in (None, {}, "x"):
        bad = {**ASK, "messages": [{"role": "user", "content": [{"type": "document", "source": source}]}]}
        status, refusal, _ = await post(http, url, bad)
        assert status == 400 and "document" in refusal["error"]["message"]


@pytest.mark.parametrize(
    ("content", "expected_error"),
    [
        ("boom", "Error: boom"),
        ("", "Error"),
        (None, "Error"),
        ("Error: no such file", "Error: no such file"),
        ("<tool_use_error>No such file</tool_use_error>", "<tool_use_error>No such file</tool_use_error>"),
        ([{"type": "text", "text": "boom"}], "Error: boom"),
    ],
)
async def test_a_failed_tool_result_is_marked_as_an_error(
    serve: Serve, http: ClientSession, content: Any, expected_error: str
) -> None:
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Read", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": content}
    for failed, expected in ((True, expected_error), (False, content if isinstance(content, str) else None)):
        turns = [*ASK["messages"], call, {"role": "user", "content": [{**result, "is_error": failed}]}]
        assert (await post(http, url, {**ASK, "messages": turns, "tools": [READ]}))[0] == 200
        if expected is not None:
            assert call_of(service).body["messages"][2]["content"] == expected


async def test_a_conversation_has_one_prefix_wherever_its_cache_breakpoint_is(
    serve: Serve, http: ClientSession
) -> None:
    """Claude Code moves the breakpoint with each request; another prefix might choose another replica."""
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    text = {"type": "text", "text": "hi"}
    marked = {**text, "cache_control": {"type": "ephemeral"}}
    turns = [{"role": "assistant", "content": "b"}, {"role": "user", "content": [marked]}]
    for messages in ([{"role": "user", "content": [marked]}], [{"role": "user", "content": [text]}, *turns]):
        async with http.post(url, json={**ASK, "messages": messages, "stream": True}) as answer:
            assert answer.status == 200
    first, second = (ask.prefix for ask in service.asks)
    assert first == second != ""


async def test_examples_of_a_tools_input_are_part_of_its_description(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service("Hello")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    tools = [{**READ, "input_examples": [{"path": "a"}, {}]}, {**READ, "name": "Write"}]
    async with http.post(url, json={**ASK, "tools": tools, "stream": True}) as answer:
        assert answer.status == 200
    functions = [tool["function"] for tool in call_of(service).body["tools"]]
    assert [function["description"] for function in functions] == [
        'Reads.\nExamples of its input:\n{"path":"a"}\n{}',
        "Reads.",
    ]
