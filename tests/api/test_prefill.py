"""Answers that their callers began: every dialect sends only what is added, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix, continue_last_message
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import GREETING

BEGUN = "".join(demo_model.pieces(GREETING)[:3])
REST = GREETING.removeprefix(BEGUN)
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": BEGUN}]


def test_only_an_assistants_last_text_is_gone_on_with() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}
    for messages in ([], TALK[:1], [*TALK, TALK[0]], [*TALK[:1], call]):
        body: dict[str, Any] = {"messages": messages}
        assert continue_last_message(body) == NO_PREFIX and body == {"messages": messages}
    body = {"messages": TALK}
    assert continue_last_message(body) == AnswerPrefix(BEGUN)
    assert body["continue_final_message"] == "content" and body["add_generation_prompt"] is False
    body = {"messages": [{"role": "assistant", "content": "", "reasoning_content": "so"}]}
    assert (
        continue_last_message(body) == AnswerPrefix("", "so")
        and body["continue_final_message"] == "reasoning_content"
    )
    body = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}
    assert continue_last_message(body) == AnswerPrefix("a")


def test_a_caller_who_says_it_in_llama_servers_words_is_left_to_it() -> None:
    body = {"messages": TALK, "continue_final_message": "content", "add_generation_prompt": False}
    assert continue_last_message(dict(body)) == NO_PREFIX


def test_what_can_not_be_read_stays_as_it_is() -> None:
    for raw in (b"{", b"[]", b'{"choices":[1]}', b'{"choices":[{"text":"a"}]}'):
        assert AnswerPrefix("a").cut_from(raw) == raw


async def lines(http: ClientSession, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        text = (await answer.read()).decode()
    found = [line.removeprefix("data: ") for line in text.splitlines()]
    return [json.loads(line) for line in found if line.startswith("{")]


@pytest.mark.llama
@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_begun_is_repeated(real: str, http: ClientSession, stream: bool) -> None:
    body = {"model": "demo", "messages": TALK, "stream": stream, "max_tokens": 100}
    told = await lines(http, f"{real}/api/chat", body)
    assert "".join(one["message"]["content"] for one in told) == REST
    told = await lines(http, f"{real}/v1/chat/completions", body)
    said = [choice.get("delta") or choice.get("message") or {} for one in told for choice in one["choices"]]
    assert "".join(one.get("content") or "" for one in said) == REST
    told = await lines(http, f"{real}/v1/messages", body)
    blocks = [part for one in told for part in one.get("content", [])]
    deltas = [one["delta"] for one in told if one["type"] == "content_block_delta"]
    assert "".join(part["text"] for part in blocks + deltas) == REST
    told = await lines(http, f"{real}/v1/responses", {"model": "demo", "input": TALK, "stream": stream})
    response = told[-1]["response"] if stream else told[0]
    assert [part["text"] for item in response["output"] for part in item["content"]] == [REST]


@pytest.mark.llama
@pytest.mark.parametrize("pieces", [["He", "llo"], ["Hello"], ["", "Hello", ""]])
async def test_a_beginning_in_parts_is_not_repeated(
    real: str, http: ClientSession, pieces: list[str]
) -> None:
    begun = {"role": "assistant", "content": [{"type": "text", "text": piece} for piece in pieces]}
    body = {"model": "demo", "messages": [TALK[0], begun], "stream": False, "max_tokens": 3}
    (told,) = await lines(http, f"{real}/v1/chat/completions", body)
    assert told["choices"][0]["message"]["content"].startswith("Hello! This")
    (told,) = await lines(http, f"{real}/v1/messages", body)
    assert told["content"][0]["text"].startswith("Hello! This")


@pytest.mark.llama
async def test_json_that_was_begun_is_ended(real: str, http: ClientSession) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "{"}]
    schema = {"type": "object", "properties": {"tall": {"type": "boolean"}}, "required": ["tall"]}
    body = {"model": "random", "messages": talk, "stream": False, "format": schema}
    (told,) = await lines(http, f"{real}/api/chat", body)
    assert set(json.loads("{" + told["message"]["content"])) == {"tall"}
