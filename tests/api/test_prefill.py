"""Prefilled answers: every dialect returns only the continuation, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix, continue_last_message
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import GREETING

PREFIX = "".join(demo_model.pieces(GREETING)[:3])
REST = GREETING.removeprefix(PREFIX)
MESSAGES = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": PREFIX}]


def test_only_a_last_message_of_the_assistant_is_continued() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}
    for messages in ([], MESSAGES[:1], [*MESSAGES, MESSAGES[0]], [*MESSAGES[:1], call]):
        body: dict[str, Any] = {"messages": messages}
        assert continue_last_message(body) == NO_PREFIX and body == {"messages": messages}
    body = {"messages": MESSAGES}
    assert continue_last_message(body) == AnswerPrefix(PREFIX)
    assert body["continue_final_message"] == "content" and body["add_generation_prompt"] is False
    body = {"messages": [{"role": "assistant", "content": "", "reasoning_content": "so"}]}
    assert (
        continue_last_message(body) == AnswerPrefix("", "so")
        and body["continue_final_message"] == "reasoning_content"
    )
    body = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}
    assert continue_last_message(body) == AnswerPrefix("a")


def test_llama_servers_own_field_for_continuing_is_left_unchanged() -> None:
    body = {"messages": MESSAGES, "continue_final_message": "content", "add_generation_prompt": False}
    assert continue_last_message(dict(body)) == NO_PREFIX


def test_unreadable_events_are_left_unchanged() -> None:
    for raw in (b"{", b"[]", b'{"choices":[1]}', b'{"choices":[{"text":"a"}]}'):
        assert AnswerPrefix("a").cut_from(raw) == raw


async def lines(http: ClientSession, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        text = (await answer.read()).decode()
    payloads = [line.removeprefix("data: ") for line in text.splitlines()]
    return [json.loads(line) for line in payloads if line.startswith("{")]


@pytest.mark.llama
@pytest.mark.parametrize("stream", [False, True])
async def test_the_prefix_is_not_repeated(real: str, http: ClientSession, stream: bool) -> None:
    body = {"model": "demo", "messages": MESSAGES, "stream": stream, "max_tokens": 100}
    answers = await lines(http, f"{real}/api/chat", body)
    assert "".join(event["message"]["content"] for event in answers) == REST
    answers = await lines(http, f"{real}/v1/chat/completions", body)
    parts = [
        choice.get("delta") or choice.get("message") or {} for event in answers for choice in event["choices"]
    ]
    assert "".join(delta.get("content") or "" for delta in parts) == REST
    answers = await lines(http, f"{real}/v1/messages", body)
    blocks = [part for event in answers for part in event.get("content", [])]
    deltas = [event["delta"] for event in answers if event["type"] == "content_block_delta"]
    assert "".join(part["text"] for part in blocks + deltas) == REST
    answers = await lines(
        http, f"{real}/v1/responses", {"model": "demo", "input": MESSAGES, "stream": stream}
    )
    response = answers[-1]["response"] if stream else answers[0]
    assert [part["text"] for item in response["output"] for part in item["content"]] == [REST]


@pytest.mark.llama
@pytest.mark.parametrize("pieces", [["He", "llo"], ["Hello"], ["", "Hello", ""]])
async def test_a_prefix_in_several_parts_is_not_repeated(
    real: str, http: ClientSession, pieces: list[str]
) -> None:
    prefix = {"role": "assistant", "content": [{"type": "text", "text": piece} for piece in pieces]}
    body = {"model": "demo", "messages": [MESSAGES[0], prefix], "stream": False, "max_tokens": 3}
    (answers,) = await lines(http, f"{real}/v1/chat/completions", body)
    assert answers["choices"][0]["message"]["content"].startswith("Hello! This")
    (answers,) = await lines(http, f"{real}/v1/messages", body)
    assert answers["content"][0]["text"].startswith("Hello! This")


@pytest.mark.llama
async def test_prefilled_json_is_completed(real: str, http: ClientSession) -> None:
    conversation = [MESSAGES[0], {"role": "assistant", "content": "{"}]
    schema = {"type": "object", "properties": {"tall": {"type": "boolean"}}, "required": ["tall"]}
    body = {"model": "random", "messages": conversation, "stream": False, "format": schema}
    (answers,) = await lines(http, f"{real}/api/chat", body)
    assert set(json.loads("{" + answers["message"]["content"])) == {"tall"}
