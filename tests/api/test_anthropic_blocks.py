"""Blocks and fields that newer clients of ``/v1/messages`` send: unknown ones are left out with a warning."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.api.anthropic.messages_ask import Tokens
from sollold.api.anthropic.request_warnings import message_warnings
from sollold.api.anthropic.tool_changes import current_tools
from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve

TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))
PATH = "/v1/messages?beta=true"
USER: dict[str, Any] = {"role": "user", "content": "go"}
ASK = {"model": "demo", "max_tokens": 9, "messages": [USER]}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": name, "input_schema": {"type": "object", "properties": {}}, **more}


def addition(definition: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": definition}}


def reference(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "tool": {"type": "tool_reference", "name": name}}


class Client:
    """Sends requests to an application whose engine answers one word, and records them."""

    def __init__(self, serve: Serve, http: ClientSession) -> None:
        self.serve, self.http = serve, http
        self.service = ScriptedService(chunk("Hello"), chunk(finish="stop"), usage_chunk())

    async def __call__(self, **more: Any) -> tuple[int, str, str]:
        url = await self.serve(parts(self.service, TOOL_MODEL)) + PATH
        async with self.http.post(url, json={**ASK, **more}) as answer:
            return answer.status, answer.headers.get("X-Sollold-Warning", ""), await answer.text()

    def names(self) -> list[str]:
        bodies = [call_of(self.service, engine).body for engine in Engine]
        tool_names = [[tool["function"]["name"] for tool in body.get("tools", ())] for body in bodies]
        assert tool_names[0] == tool_names[1]
        return tool_names[0]


async def test_too_many_stop_sequences_are_refused(ask: Client) -> None:
    status, _, text = await ask(stop_sequences=[f"x{number}" for number in range(257)])
    assert status == 400 and "stop_sequences has more than 256" in text and not ask.service.asks
    assert (await ask(stop_sequences=[f"x{number}" for number in range(256)]))[0] == 200


@pytest.fixture
def ask(serve: Serve, http: ClientSession) -> Client:
    return Client(serve, http)


@pytest.mark.parametrize("display", ["updates", "highlights"])
async def test_an_unknown_display_of_thinking_is_ignored_with_a_warning(ask: Client, display: str) -> None:
    """Claude Code 2.1.332 sends it first; if refused, each process and subagent retries twice."""
    status, warned, text = await ask(thinking={"type": "adaptive", "display": display})
    assert status == 200 and f"thinking.display {display} has no effect" in warned and "Hello" in text


async def test_tools_are_added_and_removed_during_a_conversation(ask: Client) -> None:
    changes = [
        addition(tool("Late")),
        reference("tool_addition", "Read"),
        reference("tool_addition", "Nowhere"),
        reference("tool_removal", "Write"),
        {"type": "text", "text": "Late can be called."},
    ]
    conversation = [USER, {"role": "system", "content": changes}]
    status, warned, _ = await ask(messages=conversation, tools=[tool("Read"), tool("Write")])
    assert (status, warned) == (200, "") and ask.names() == ["Read", "Late"]
    assert "Late can be called." in str(call_of(ask.service).body["messages"])
    extended = [*conversation, {"role": "system", "content": [reference("tool_addition", "Write")]}]
    assert (await ask(messages=extended, tools=[tool("Read"), tool("Write")]))[0] == 200
    assert ask.names() == ["Read", "Late", "Write"]
    # A message that only changes tools is not sent to the model.
    assert len(call_of(ask.service).body["messages"]) == len(conversation)


async def test_a_redefined_tool_is_offered_once_and_a_compaction_keeps_tool_changes(
    ask: Client,
) -> None:
    newer = tool("Read") | {"description": "newer"}
    compaction = {"type": "compaction", "content": "…", "tool_changes": [addition(newer)]}
    conversation = [
        USER,
        {"role": "assistant", "content": [compaction, {"type": "text", "text": "ok"}]},
        USER,
    ]
    chosen = {"type": "tool", "name": "Read"}
    status, _, _ = await ask(messages=conversation, tools=[tool("Read")], tool_choice=chosen)
    assert status == 200 and ask.names() == ["Read"]
    assert call_of(ask.service).body["tools"][0]["function"]["description"] == "newer"
    without_read = [USER, {"role": "system", "content": [reference("tool_removal", "Read")]}]
    status, _, text = await ask(
        messages=without_read, tools=[tool("Read"), tool("Write")], tool_choice=chosen
    )
    assert status == 400 and "not among the tools" in text


def test_many_tool_changes_do_not_block_the_loop() -> None:
    count = 30_000
    tools: list[dict[str, Any]] = [{"name": f"t{number}"} for number in range(count)]
    removals = [{"type": "tool_removal", "tool": {"name": f"t{number}"}} for number in range(1, count)]
    turn = {"role": "system", "content": removals}
    ask = msgspec.convert({"model": "m", "messages": [turn], "tools": tools}, Tokens)
    began = time.process_time()
    assert current_tools(ask) == tools[:1]
    assert time.process_time() - began < 5


async def test_unknown_blocks_are_left_out_with_a_warning(ask: Client) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1"}
    conversation = [
        {"role": "user", "content": [{"type": "browser_state", "url": "x"}, {"type": "text", "text": "go"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}},
                {"type": "connector_text", "text": "x"},
                {"type": "tool_use", "id": "c1", "name": "Read", "input": {}},
            ],
        },
        {"role": "user", "content": [{**result, "content": [{"type": "resource", "text": "found"}]}]},
    ]
    status, warned, _ = await ask(messages=conversation)
    assert status == 200
    assert "blocks of type browser_state, connector_text, resource are not known" in warned
    sent = call_of(ask.service).body["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert [sent[0]["content"], sent[2]["content"]] == ["go", "found"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "txt", "text": "hi"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": ["text"]}]},
        {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]},
        {"role": "assistant", "content": [{"type": "thinking"}]},
    ],
)
async def test_a_user_message_without_known_blocks_and_malformed_blocks_are_refused(
    ask: Client, turn: Any
) -> None:
    status, _, text = await ask(messages=[turn])
    assert status == 400 and "unsupported content block" in text


@pytest.mark.parametrize(
    ("edits", "warned"),
    [
        ([{"type": "clear_thinking_20251015", "keep": "all"}], False),
        ([{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}], True),
        ([{"type": "clear_tool_uses_20250919"}], True),
        (["all"], True),
    ],
)
def test_clear_thinking_warns_unless_it_keeps_all(edits: list[Any], warned: bool) -> None:
    """Claude Code sends this in each request."""
    assert bool(message_warnings({**ASK, "context_management": {"edits": edits}})) is warned
