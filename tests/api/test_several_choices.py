"""Streams with several choices: their counts come once, at the end, for all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, parts
from tests.api.conftest import Serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def counts(prompt: int, made: int, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": made, "prompt_tokens_details": details}


def chat_ends(index: int, usage: dict[str, Any]) -> list[dict[str, Any]]:
    """As llama-server ends a choice of a chat: its counts are an event without choices."""
    end = {"index": index, "delta": {}, "finish_reason": "stop"}
    return [{"model": "x", "choices": [end]}, {"model": "x", "choices": [], "usage": usage}]


def text_ends(index: int, usage: dict[str, Any]) -> list[dict[str, Any]]:
    """As llama-server ends a choice of a completion: its counts are in its last event."""
    end = {"index": index, "text": "", "finish_reason": "stop"}
    return [{"model": "x", "choices": [end], "usage": usage}]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("path", "asked", "prompt", "cached"),
    [
        (CHAT, {**HI, "n": 2}, 8, 3),
        (TEXT, {"prompt": "hi", "n": 2}, 8, 3),
        (TEXT, {"prompt": ["hi", "ho"]}, 16, 7),
        (TEXT, {"prompt": [[1, 2], [3]]}, 16, 7),
    ],
)
async def test_the_counts_of_all_choices_come_once_and_last(
    path: str,
    asked: dict[str, Any],
    prompt: int,
    cached: int,
    counted: bool,
    serve: Serve,
    http: ClientSession,
) -> None:
    ends = chat_ends if path == CHAT else text_ends
    service = ScriptedService(*ends(1, counts(8, 2, 4)), *ends(0, counts(8, 5, 3)))
    url = await serve(parts(service))
    body = {"model": "demo", "stream": True, **asked}
    if counted:
        body["stream_options"] = {"include_usage": True}
    async with http.post(url + path, json=body) as answer:
        lines = (await answer.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    ended = [event["choices"][0]["index"] for event in events if event["choices"]]
    assert ended == [1, 0] and {event["model"] for event in events} == {"demo"}
    told = [event for event in events if event.get("usage")]
    if not counted:
        assert not told
        return
    total = {"total_tokens": prompt + 7}
    assert told == events[-1:] and told[0]["choices"] == []
    assert told[0]["usage"] == counts(prompt, 7, cached) | total


async def test_an_ollama_that_gives_one_choice_is_counted_right(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(*chat_ends(0, counts(8, 5)), engine=Engine.OLLAMA)
    url = await serve(parts(service))
    body = {"model": "demo", "stream": True, "n": 2, "stream_options": {"include_usage": True}, **HI}
    async with http.post(url + CHAT, json=body) as answer:
        last = (await answer.read()).decode().split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["usage"] == counts(8, 5) | {"total_tokens": 13}
