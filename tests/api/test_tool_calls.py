"""Required tool calls and tool calls that can't be parsed, in each dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import Recital
from tests.api import reciters
from tests.api.api_parts import (
    PlainLibrary,
    ScriptedService,
    call_of,
    chunk,
    model,
    parts,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.api.dialects import body_of, post, tools_of
from tests.api.direct_service import DirectService, LlamaServer
from tests.api.llama_grammars import Grammar

USER = [{"role": "user", "content": "What time is it?"}]
ZONES = {"type": "string", "enum": ["utc", "cet"]}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {"zone": ZONES}, "required": ["zone"]},
    },
}
TALKER = model("talker:latest", capabilities=("completion", "tools"))
REQUIRED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"tool_choice": "required", "max_tokens": 80},
    "/v1/responses": {"tool_choice": "required", "max_output_tokens": 80},
    "/v1/messages": {"tool_choice": {"type": "any"}, "max_tokens": 80},
}


@pytest.fixture(scope="module")
def talker(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a llama-server whose model never calls tools by itself, with a template for tools."""
    file = tmp_path_factory.mktemp("talker") / "talker.gguf"
    demo_model.write(
        file, Recital(demo_model.pieces(demo_model.GREETING), template=reciters.TEMPLATE.read_text())
    )
    with LlamaServer(llama.server, file, context=1024) as server:
        yield server.url


@pytest.fixture
async def url(talker: str, serve: Serve) -> AsyncIterator[str]:
    yield await serve(parts(DirectService({TALKER.name: talker}), library=PlainLibrary(TALKER)))


def call_in(path: str, answer: dict[str, Any]) -> tuple[str, Any]:
    """Name and arguments of the only call in an answer."""
    if path == "/v1/chat/completions":
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
        (call,) = choice["message"]["tool_calls"]
        return call["function"]["name"], json.loads(call["function"]["arguments"])
    if path == "/v1/responses":
        (item,) = answer["output"]
        return item["name"], json.loads(item["arguments"])
    (block,) = answer["content"]
    assert answer["stop_reason"] == "tool_use"
    return block["name"], block["input"]


@pytest.mark.llama
@pytest.mark.parametrize("path", REQUIRED)
async def test_a_required_call_is_forced(url: str, http: ClientSession, path: str) -> None:
    tools = tools_of(path, TOOL)
    status, answer, _ = await post(
        http, url + path, body_of(path, "talker", USER, tools=tools) | REQUIRED[path]
    )
    assert status == 200, answer
    name, arguments = call_in(path, answer)
    assert name == "get_time" and arguments["zone"] in ("utc", "cet")


@pytest.mark.llama
async def test_a_required_call_is_streamed(url: str, http: ClientSession) -> None:
    body = {"model": "talker", "messages": USER, "tools": [TOOL], "stream": True, "temperature": 0}
    async with http.post(
        f"{url}/v1/chat/completions", json={**body, **REQUIRED["/v1/chat/completions"]}
    ) as answer:
        events = [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    assert not any(choice["delta"].get("content") for choice in choices)
    (call,) = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert call["index"] == 0 and json.loads(call["function"]["arguments"])["zone"]
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "further",
    [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}],
    ids=["forced", "format"],
)
async def test_the_deadline_covers_both_tries(
    serve: Serve, http: ClientSession, further: dict[str, Any]
) -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": "{}"}}
    service = ScriptedService(0.2, {"choices": [choice]})
    url = await serve(parts(service, TALKER))
    body = {"model": "talker", "messages": USER, "tools": [TOOL], "timeout": "5s", **further}
    await post(http, f"{url}/v1/chat/completions", body)
    first, second = (ask.deadline for ask in service.asks)
    assert first == 5.0 and 4.0 < second < 4.9


def linked(kind: str, definitions: str) -> dict[str, Any]:
    """Return a tool's schema: a list of values of this type, linked by a definition of the same name."""
    link = {"$ref": f"#/{definitions}/Link"}
    values = {"type": "object", "properties": {"value": {"type": kind}, "next": link}, "required": ["value"]}
    schema = {"type": "object", "properties": {"first": link}, "required": ["first"]}
    return {**schema, definitions: {"Link": values}}


@pytest.mark.parametrize("definitions", ["$defs", "definitions"])
async def test_a_required_call_follows_the_schema_of_its_own_tool(
    serve: Serve, http: ClientSession, definitions: str
) -> None:
    message = {"content": ""}
    service = ScriptedService({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})
    url = await serve(parts(service, TALKER))
    kinds = {"text": "string", "number": "integer"}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": name, "parameters": linked(kind, definitions)}}
        for name, kind in kinds.items()
    ]
    for offered in (tools, tools[:1]):
        body = {"model": "talker", "messages": USER, "tools": offered, "tool_choice": "required"}
        await post(http, f"{url}/v1/chat/completions", body)
        schema = call_of(service).body["response_format"]["json_schema"]["schema"]
        grammar = Grammar(schema)
        for tool in offered:
            name = tool["function"]["name"]
            for kind, value in (("string", "a"), ("integer", 1)):
                call = {"name": name, "arguments": {"first": {"value": value, "next": {"value": value}}}}
                assert grammar.accepts(schema, call) == (kinds[name] == kind), (call, schema)


async def test_truncated_and_missing_calls_keep_their_text(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    url = await serve(parts(service, TALKER))
    body = {"model": "talker", "messages": USER, "tools": [TOOL], "tool_choice": "required"}

    async def message(text: str, finish: str) -> dict[str, Any]:
        assistant = {"role": "assistant", "content": text}
        service.events = ({"choices": [{"index": 0, "finish_reason": finish, "message": assistant}]},)
        _, answer, _ = await post(http, f"{url}/v1/chat/completions", body)
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    cut = await message('{"name": "get_time", "arguments": {"zo', "length")
    assert cut["finish_reason"] == "length"
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"zo'
    fenced = await message('```json\n{"name":"get_time","arguments":{}}\n```', "stop")
    assert fenced["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    assert (await message("Hello", "stop"))["message"]["content"] == "Hello"
    assert call_of(service).body["tool_choice"] == "none"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_a_call_that_can_not_be_parsed_is_returned_as_text(
    serve: Serve, http: ClientSession, path: str
) -> None:
    unparsed = Refusal(
        Fault.ENGINE, "The model produced output that does not match the expected hermes format", status=500
    )

    class Unparsing(ScriptedService):
        async def open(self, ask: Any, on_wait: Any) -> Any:
            self.refusal = unparsed if ask.calls["llama"].body.get("tool_choice") != "none" else None
            return await super().open(ask, on_wait)

    text = "<tool_call>{broken"
    whole = {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    }
    streamed = (chunk(text), chunk(finish="stop"), usage_chunk())
    events = streamed if path in ("/v1/responses", "/v1/messages") else (whole,)
    url = await serve(parts(Unparsing(*events), TALKER))
    status, answer, _ = await post(
        http, url + path, body_of(path, "talker", USER, tools=tools_of(path, TOOL))
    )
    assert status == 200 and text in json.dumps(answer, ensure_ascii=False)
    # A stream that has started ends with the text so far.
    service = ScriptedService(chunk("Hel"), chunk("lo"), unparsed)
    url = await serve(parts(service, TALKER))
    body = body_of(path, "talker", USER, tools=tools_of(path, TOOL), stream=True)
    async with http.post(url + path, json=body) as response:
        output = await response.text()
    assert "lo" in output and "does not match" not in output and '"error": {' not in output
    if path == "/v1/chat/completions":
        chunks = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        for field in ("id", "object", "created", "model"):
            assert chunks[-1][field] == chunks[0][field]
    service.events = (chunk("Hel"), Refusal(Fault.ENGINE, "boom", status=500))
    async with http.post(url + path, json=body) as response:
        assert "boom" in await response.text()


@pytest.mark.llama
@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_instead_of_a_call_has_the_requested_format(
    url: str, http: ClientSession, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"tall": {"type": "boolean"}}, "required": ["tall"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    more = {"tools": [TOOL], "response_format": wanted, "max_tokens": 80, "stream": stream}
    body = body_of("/v1/chat/completions", "talker", USER, **more)
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        raw = await answer.text()
    events = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if "choices" in line]
    deltas = [
        choice.get("delta") or choice.get("message") or {} for event in events for choice in event["choices"]
    ]
    assert set(json.loads("".join(delta.get("content") or "" for delta in deltas))) == {"tall"}


@pytest.mark.parametrize("offered", [{}, {"tools": []}, {"tools": None}])
@pytest.mark.parametrize(
    ("path", "choice"),
    [
        ("/v1/chat/completions", "required"),
        ("/v1/responses", "required"),
        ("/v1/messages", {"type": "any"}),
        ("/v1/messages", {"type": "tool", "name": "get_time"}),
    ],
)
async def test_a_required_call_without_tools_is_refused(
    serve: Serve, http: ClientSession, path: str, choice: Any, offered: dict[str, Any]
) -> None:
    url = await serve(parts(ScriptedService(chunk("Hello")), TALKER))
    body = body_of(path, "talker", USER, tool_choice=choice, **offered)
    status, answer, _ = await post(http, url + path, body)
    assert status == 400 and "there are no tools" in json.dumps(answer)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"parallel_tool_calls": False}),
        ("/v1/responses", {"parallel_tool_calls": False}),
        ("/v1/messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ],
)
async def test_an_answer_has_one_call_if_parallel_calls_are_disabled(
    serve: Serve, http: ClientSession, path: str, more: dict[str, Any]
) -> None:
    def call(index: int) -> dict[str, Any]:
        function = {"name": "get_time", "arguments": f'{{"zone":"z{index}"}}'}
        return {"index": index, "id": f"call_{index}", "type": "function", "function": function}

    streamed = (chunk(tool_calls=[call(0)]), chunk(tool_calls=[call(1)]), chunk(finish="tool_calls"))
    service = ScriptedService(*streamed, usage_chunk())
    url = await serve(parts(service, TALKER))
    body = body_of(path, "talker", USER, tools=tools_of(path, TOOL), stream=True)
    async with http.post(url + path, json={**body, **more}) as answer:
        text = await answer.text()
    assert answer.status == 200 and "z0" in text and "z1" not in text and "call_1" not in text
    async with http.post(url + path, json=body) as answer:
        assert "z1" in await answer.text()
    if path == "/v1/chat/completions":
        message = {"role": "assistant", "content": None, "tool_calls": [call(0), call(1)]}
        service.events = ({"choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}]},)
        _, whole, _ = await post(http, url + path, {**body, **more, "stream": False})
        assert [made["id"] for made in whole["choices"][0]["message"]["tool_calls"]] == ["call_0"]
