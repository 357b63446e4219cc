"""``/v1/responses`` as agents use it: namespaces, tool search, reasoning summaries, agent messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import post
from tests.api.reciters import THOUGHT

TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))
TIME = {"type": "function", "name": "get_time", "description": "d", "parameters": {"type": "object"}}
CLOCK = {"type": "namespace", "name": "mcp__clock", "description": "A server's tools.", "tools": [TIME]}
SEARCH = {"type": "tool_search", "execution": "client", "description": "Finds.", "parameters": {}}
NAME = "mcp__clock__get_time"
PATH = "/v1/responses"


def calls(name: str, arguments: str = '{"zone": "utc"}') -> ScriptedService:
    call = {"index": 0, "id": "c1", "function": {"name": name, "arguments": arguments}}
    return ScriptedService(chunk(tool_calls=[call]), chunk(finish="tool_calls"), usage_chunk())


def thinks() -> ScriptedService:
    return ScriptedService(
        chunk(reasoning_content="I"), chunk(reasoning_content=" think"), chunk("Hello"), chunk(finish="stop")
    )


async def streamed(http: ClientSession, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(url, json={**body, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        return [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]


@pytest.mark.parametrize("namespace", ["mcp__clock", "mcp__clock__"])
async def test_tools_of_a_namespace_are_called_under_its_name(
    serve: Serve, http: ClientSession, namespace: str
) -> None:
    """Codex offers the tools of an MCP server this way, and finds a call's server by the namespace."""
    service = calls(NAME)
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    patch = {"type": "custom", "name": "patch"}
    tools = [{**CLOCK, "name": namespace, "tools": [TIME, patch]}, {**TIME, "name": "shell"}]
    body = {"model": "demo", "input": "go", "tools": tools}
    status, answer, headers = await post(http, url, body)
    assert status == 200 and "X-Sollold-Warning" not in headers
    for engine in Engine:
        names = [tool["function"]["name"] for tool in call_of(service, engine).body["tools"]]
        assert names == [NAME, "mcp__clock__patch", "shell"]
    (item,) = answer["output"]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", namespace, "get_time")
    done = next(
        event for event in await streamed(http, url, body) if event["type"] == "response.output_item.done"
    )
    assert (done["item"]["namespace"], done["item"]["name"]) == (namespace, "get_time")
    # In the next request the model sees the name that it used.
    result = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
    await post(http, url, {**body, "input": [{"role": "user", "content": "go"}, item, result]})
    messages = call_of(service).body["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == NAME and messages[2]["content"] == "noon"
    chosen = {"type": "function", "name": "get_time"}
    await post(http, url, {**body, "tool_choice": chosen})
    assert [tool["function"]["name"] for tool in call_of(service).body["tools"]] == [NAME]


@pytest.mark.llama
async def test_llama_cpp_calls_a_tool_of_a_namespace(real: str, http: ClientSession) -> None:
    tools = [{**CLOCK, "name": "", "tools": [TIME]}]
    status, answer, _ = await post(http, real + PATH, {"model": "call", "input": "go", "tools": tools})
    assert status == 200 and answer["output"][0]["name"] == "get_time"


async def test_tool_search_runs_in_the_client(serve: Serve, http: ClientSession) -> None:
    service = calls("tool_search", '{"query": "time"}')
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    body = {"model": "demo", "input": "go", "tools": [SEARCH]}
    _, answer, headers = await post(http, url, body)
    (call,) = answer["output"]
    assert call["type"] == "tool_search_call" and call["execution"] == "client"
    assert call["arguments"] == {"query": "time"} and call["call_id"] == "c1"
    assert "X-Sollold-Warning" not in headers
    # Tools that were found can be called in the next request.
    search_output = {"type": "tool_search_output", "call_id": "c1", "execution": "client", "tools": [CLOCK]}
    items = [{"role": "user", "content": "go"}, call, search_output]
    status, _, headers = await post(http, url, {**body, "input": items})
    assert status == 200 and "X-Sollold-Warning" not in headers
    sent = call_of(service).body
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["tool_search", NAME]
    assert json.loads(sent["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"query": "time"}
    assert sent["messages"][2]["role"] == "tool" and NAME in sent["messages"][2]["content"]


async def test_tools_for_server_side_search_are_offered_immediately(
    serve: Serve, http: ClientSession
) -> None:
    service = calls("get_time")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    searched = [
        {"type": "tool_search_call", "id": "t1", "call_id": None, "execution": "server", "arguments": {}},
        {"type": "tool_search_output", "id": "t2", "call_id": None, "execution": "server", "tools": [TIME]},
    ]
    body = {"model": "demo", "input": [{"role": "user", "content": "go"}, *searched]}
    tools = [{"type": "tool_search"}, {**TIME, "defer_loading": True}]
    status, _, headers = await post(http, url, {**body, "tools": tools})
    assert status == 200 and "X-Sollold-Warning" not in headers
    sent = call_of(service).body
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["get_time"]
    assert [message["role"] for message in sent["messages"]] == ["user"]


SECRET = "gAAAA" + "x" * 60


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Count them.", "Count them."),
        ([{"type": "input_text", "text": "Count them."}], "Count them."),
        (
            [
                {"type": "input_text", "text": "Payload:\n"},
                {"type": "encrypted_content", "encrypted_content": "Count."},
            ],
            "Payload:\nCount.",
        ),
        (
            [
                {"type": "input_text", "text": "Payload:"},
                {"type": "encrypted_content", "encrypted_content": SECRET},
            ],
            "Payload:",
        ),
    ],
)
async def test_an_agent_message_reaches_the_model(
    serve: Serve, http: ClientSession, content: Any, text: str
) -> None:
    """Codex sends a subagent its task this way."""
    service = calls("x")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    task = {
        "type": "agent_message",
        "id": "amsg_1",
        "author": "/root",
        "recipient": "/root/a",
        "content": content,
    }
    for items in ([task], [{"role": "user", "content": "go"}, task]):
        status, _, headers = await post(http, url, {"model": "demo", "input": items})
        assert status == 200 and "X-Sollold-Warning" not in headers
        assert call_of(service).body["messages"][-1] == {"role": "user", "content": text}


async def test_an_unknown_item_is_left_out_with_a_warning(serve: Serve, http: ClientSession) -> None:
    service = calls("x")
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    unknown = {"type": "ghost_snapshot", "ghost_commit": {}}
    items = [{"role": "user", "content": "go"}, unknown]
    status, _, headers = await post(http, url, {"model": "demo", "input": items})
    assert status == 200 and "ghost_snapshot" in headers["X-Sollold-Warning"]
    assert len(call_of(service).body["messages"]) == 1
    status, answer, _ = await post(http, url, {"model": "demo", "input": [unknown]})
    assert status == 400 and "ghost_snapshot" in answer["error"]["message"]


async def test_reasoning_is_a_summary_on_request(serve: Serve, http: ClientSession) -> None:
    """Clients for OpenAI's models read only the summary."""
    url = await serve(parts(thinks(), TOOL_MODEL)) + PATH
    body = {"model": "demo", "input": "go", "reasoning": {"effort": "high", "summary": "auto"}}
    events = await streamed(http, url, body)
    kinds = [
        event["type"].removeprefix("response.reasoning_") for event in events if "reasoning" in event["type"]
    ]
    assert kinds == [
        "summary_part.added",
        "summary_text.delta",
        "summary_text.delta",
        "summary_text.done",
        "summary_part.done",
    ]
    (item,) = [
        output_item for output_item in events[-1]["response"]["output"] if output_item["type"] == "reasoning"
    ]
    assert item["summary"] == [{"type": "summary_text", "text": "I think"}] and item["content"] == []
    _, answer, _ = await post(http, url, {**body, "reasoning": {"effort": "high"}})
    assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "I think"}]


@pytest.mark.parametrize("summary", ["auto", None])
@pytest.mark.parametrize("kept_fields", [("summary",), ("encrypted_content", "summary"), ("content",)])
async def test_reasoning_is_restored_from_stored_items(
    serve: Serve, http: ClientSession, summary: str | None, kept_fields: tuple[str, ...]
) -> None:
    service = thinks()
    url = await serve(parts(service, TOOL_MODEL)) + PATH
    body = {"model": "demo", "include": ["reasoning.encrypted_content"], "reasoning": {"summary": summary}}
    _, answer, _ = await post(http, url, {**body, "input": "go"})
    item = {key: answer["output"][0][key] for key in ("id", "type", *kept_fields)}
    conversation = [
        {"role": "user", "content": "go"},
        item,
        answer["output"][1],
        {"role": "user", "content": "on"},
    ]
    await post(http, url, {**body, "input": conversation})
    expect_lost = (summary is None and kept_fields == ("summary",)) or (
        summary and kept_fields == ("content",)
    )
    message = call_of(service).body["messages"][1]
    assert message.get("reasoning_content") == (None if expect_lost else "I think")
    # Encrypted content of another server can't be read.
    foreign = {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
    await post(http, url, {**body, "input": [{"role": "user", "content": "go"}, foreign, *conversation[2:]]})
    assert "reasoning_content" not in call_of(service).body["messages"][1]


@pytest.mark.parametrize("engine", Engine)
async def test_input_tokens_are_counted(serve: Serve, http: ClientSession, engine: Engine) -> None:
    count_event = {"input_tokens": 7} if engine is Engine.LLAMA else {"usage": {"prompt_tokens": 7}}
    service = ScriptedService(count_event, engine=engine)
    only = "Its files can't be read." if engine is Engine.OLLAMA else ""
    url = await serve(parts(service, model(capabilities=TOOL_MODEL.capabilities, only_ollama=only)))
    body = {"model": "demo", "input": "go", "instructions": "Be kind.", "tools": [CLOCK], "stream": True}
    status, answer, _ = await post(http, f"{url}{PATH}/input_tokens", body)
    assert (status, answer) == (200, {"object": "response.input_tokens", "input_tokens": 7})
    sent = call_of(service, engine).body
    assert [message["content"] for message in sent["messages"]] == ["Be kind.", "go"] and "stream" not in sent
    status, answer, _ = await post(http, f"{url}{PATH}/input_tokens", {"model": "demo"})
    assert status == 400 and "input" in answer["error"]["message"]


@pytest.mark.llama
async def test_llama_cpp_counts_input_tokens(real: str, http: ClientSession) -> None:
    counts = []
    for text in ("a", "a b c d e f"):
        status, answer, _ = await post(http, f"{real}{PATH}/input_tokens", {"model": "demo", "input": text})
        assert status == 200
        counts.append(answer["input_tokens"])
    assert 0 < counts[0] < counts[1]


@pytest.mark.llama
async def test_llama_cpps_reasoning_is_in_the_summary(real: str, http: ClientSession) -> None:
    body = {"model": "think", "input": "go", "reasoning": {"effort": "high", "summary": "auto"}}
    _, answer, _ = await post(http, real + PATH, body)
    assert answer["output"][0]["summary"][0]["text"].strip() == THOUGHT
