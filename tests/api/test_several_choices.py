"""Answers with several choices: usage is sent once, at the end, for all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import BODIES, ScriptedService, call_of, chunk, model, parts
from tests.api.conftest import Serve
from tests.doubles import until

NOT_UTF8 = b'{"choices": [{"index": 0, "delta": {"content": "\xff"}}]}'
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def usage_of(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}


def chat_ends(index: int, usage: dict[str, Any]) -> list[dict[str, Any]]:
    """The last events of a chat's choice from llama-server: usage is in an event without choices."""
    end = {"index": index, "delta": {}, "finish_reason": "stop"}
    return [{"model": "x", "choices": [end]}, {"model": "x", "choices": [], "usage": usage}]


def text_ends(index: int, usage: dict[str, Any]) -> list[dict[str, Any]]:
    """The last event of a completion's choice from llama-server: it has usage."""
    end = {"index": index, "text": "", "finish_reason": "stop"}
    return [{"model": "x", "choices": [end], "usage": usage}]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("path", "fields", "prompt", "cached"),
    [
        (CHAT, {**HI, "n": 2}, 8, 3),
        (TEXT, {"prompt": "hi", "n": 2}, 8, 3),
        (TEXT, {"prompt": ["hi", "ho"]}, 16, 7),
        (TEXT, {"prompt": [[1, 2], [3]]}, 16, 7),
    ],
)
async def test_usage_of_all_choices_is_sent_once_and_last(
    path: str,
    fields: dict[str, Any],
    prompt: int,
    cached: int,
    counted: bool,
    serve: Serve,
    http: ClientSession,
) -> None:
    ends = chat_ends if path == CHAT else text_ends
    services = parts(ScriptedService(*ends(1, usage_of(8, 2, 4)), *ends(0, usage_of(8, 5, 3))))
    url = await serve(services)
    body = {"model": "demo", "stream": True, **fields}
    if counted:
        body["stream_options"] = {"include_usage": True}
    async with http.post(url + path, json=body) as answer:
        lines = (await answer.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    await until(lambda: services.monitor.activity.finished)
    (recorded,) = services.monitor.activity.recent
    assert (recorded.prompt_tokens, recorded.tokens) == (prompt, 7)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    ended = [event["choices"][0]["index"] for event in events if event["choices"]]
    assert ended == [1, 0] and {event["model"] for event in events} == {"demo"}
    with_usage = [event for event in events if event.get("usage")]
    if not counted:
        assert not with_usage
        return
    total = {"total_tokens": prompt + 7}
    assert with_usage == events[-1:] and with_usage[0]["choices"] == []
    assert with_usage[0]["usage"] == usage_of(prompt, 7, cached) | total


async def test_usage_of_ollama_with_one_choice_is_correct(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(*chat_ends(0, usage_of(8, 5)), engine=Engine.OLLAMA)
    url = await serve(parts(service))
    body = {"model": "demo", "stream": True, "n": 2, "stream_options": {"include_usage": True}, **HI}
    async with http.post(url + CHAT, json=body) as answer:
        last = (await answer.read()).decode().split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["usage"] == usage_of(8, 5) | {"total_tokens": 13}


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize(("fields", "shown"), [({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 1}, 1)])
async def test_tokens_have_as_many_alternatives_as_requested(
    serve: Serve, http: ClientSession, fields: dict[str, Any], shown: int, choices: int
) -> None:
    alternative = {"token": "a", "logprob": -1.0, "bytes": [97]}
    event = delta_chunk(0, content="a")
    event["choices"][0]["logprobs"] = {"content": [{**alternative, "top_logprobs": [alternative]}]}
    url = await serve(parts(ScriptedService(event, *chat_ends(0, usage_of(1, 1)))))
    body = {"model": "demo", "logprobs": True, "n": choices, "stream": choices == 1, **HI, **fields}
    async with http.post(url + CHAT, json=body) as answer:
        text = (await answer.read()).decode()
    first = json.loads(text.split("\n\n")[0].removeprefix("data: "))
    rows = [{**alternative, "top_logprobs": [alternative][:shown]}]
    assert first["choices"][0]["logprobs"] == {"content": rows, "refusal": None}


def tool_piece(index: int, **function: str) -> dict[str, Any]:
    piece: dict[str, Any] = {"index": 0, "function": function}
    if "name" in function:
        piece |= {"id": f"call_{index}", "type": "function"}
    return {"choices": [{"index": index, "delta": {"tool_calls": [piece]}}]}


def delta_chunk(index: int, **delta: Any) -> dict[str, Any]:
    row = {"token": delta.get("content", ""), "logprob": -1.0, "top_logprobs": []}
    choice = {"index": index, "delta": delta, "logprobs": {"content": [row]}, "finish_reason": None}
    return {
        "id": "chatcmpl-1",
        "created": 1,
        "model": "x",
        "object": "chat.completion.chunk",
        "choices": [choice],
    }


async def test_usage_of_a_whole_chat_is_the_sum_of_choices(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(
        delta_chunk(1, role="assistant", content="b"),
        delta_chunk(0, role="assistant", content="a"),
        delta_chunk(0, reasoning_content="hm"),
        delta_chunk(1, content="c"),
        tool_piece(0, name="get", arguments='{"x"'),
        tool_piece(0, arguments=":1}"),
        *chat_ends(1, usage_of(8, 2, 4)),
        *chat_ends(0, usage_of(8, 5, 3)),
    )
    url = await serve(parts(service))
    async with http.post(url + CHAT, json={"model": "demo", "n": 2, "logprobs": True, **HI}) as answer:
        assert answer.status == 200 and answer.content_type == "application/json"
        whole = await answer.json()
    body = service.asks[0].calls[Engine.LLAMA].body
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert (whole["id"], whole["object"], whole["model"]) == ("chatcmpl-1", "chat.completion", "demo")
    assert whole["usage"] == usage_of(8, 7, 3) | {"total_tokens": 15}
    first, second = whole["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert second["message"] == {"role": "assistant", "content": "bc", "refusal": None}
    assert [row["token"] for row in second["logprobs"]["content"]] == ["b", "c"]
    assert second["finish_reason"] == "stop" and first["message"]["content"] == "a"
    assert first["message"]["reasoning_content"] == first["message"]["reasoning"] == "hm"
    (call,) = first["message"]["tool_calls"]
    assert call["id"] == "call_0" and call["function"] == {"name": "get", "arguments": '{"x":1}'}


@pytest.mark.parametrize("fields", [{"prompt": "hi", "n": 2}, {"prompt": ["hi", "ho"]}])
async def test_usage_of_a_whole_completion_is_the_sum_of_choices(
    fields: dict[str, Any], serve: Serve, http: ClientSession
) -> None:
    row = {"token": "a", "logprob": -1.0, "top_logprobs": []}
    pieces = [
        {"choices": [{"index": 0, "text": text, "logprobs": {"content": [row]}, "finish_reason": None}]}
        for text in ("a", "b")
    ]
    service = ScriptedService(b"null", *pieces, *text_ends(1, usage_of(8, 2)), *text_ends(0, usage_of(8, 5)))
    url = await serve(parts(service))
    async with http.post(url + TEXT, json={"model": "demo", "logprobs": 0, **fields}) as answer:
        whole = await answer.json()
    assert whole["object"] == "text_completion" and whole["usage"]["completion_tokens"] == 7
    first, second = whole["choices"]
    assert (first["text"], second["text"], first["finish_reason"]) == ("ab", "", "stop")
    assert first["logprobs"]["token_logprobs"] == [-1.0, -1.0]
    assert first["logprobs"]["text_offset"] == [0, 1] and first["logprobs"]["top_logprobs"] is None


async def test_an_engine_error_fails_the_whole_answer(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(delta_chunk(0, content="a"), {"error": {"message": "boom", "code": 500}})
    url = await serve(parts(service))
    async with http.post(url + CHAT, json={"model": "demo", "n": 2, **HI}) as answer:
        assert answer.status == 502 and "boom" in await answer.text()


@pytest.mark.llama
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_of_llama_cpps_choices(path: str, real: str, http: ClientSession) -> None:
    fields = HI if path == CHAT else {"prompt": "hi"}
    usages = []
    for n in (1, 2):
        body = {"model": "demo", "n": n, "max_tokens": 4, "seed": 1, **fields}
        async with http.post(real + path, json=body) as answer:
            whole = await answer.json()
        assert len(whole.get("choices", ())) == n, whole
        usages.append((whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]))
        assert set(whole["choices"][0]) == {"index", "finish_reason", "logprobs"} | (
            {"message"} if path == CHAT else {"text"}
        )
    assert usages[1][0] == usages[0][0] and usages[1][1] > usages[0][1] > 0


@pytest.mark.parametrize(
    "event",
    [{"choices": [{"index": "a"}]}, {"choices": [{"index": 0, "delta": {"content": 5}}]}, b"{", NOT_UTF8],
)
async def test_an_unreadable_chunk_is_the_engines_error(
    serve: Serve, http: ClientSession, event: Any
) -> None:
    url = await serve(parts(ScriptedService(chunk("a"), event)))
    body = {"model": "demo", "messages": [{"role": "user", "content": "a"}], "n": 2}
    async with http.post(url + "/v1/chat/completions", json=body) as answer:
        assert answer.status == 502 and "unreadable" in await answer.text()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/api/chat"])
async def test_text_that_is_not_utf8_is_the_engines_error(
    serve: Serve, http: ClientSession, path: str
) -> None:
    url = await serve(parts(ScriptedService(chunk("a"), NOT_UTF8)))
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "demo", "messages": messages, "input": "a", "max_tokens": 9, "stream": True}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200 and "unreadable" in await answer.text()


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_an_unreadable_record_is_ollamas_error(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(ScriptedService(b"<html>", engine=Engine.OLLAMA)))
    async with http.post(url + path, json={**BODIES[path], "stream": False}) as answer:
        assert answer.status == 502 and "unreadable" in await answer.text()


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_functions_are_answered_with_a_function_call(
    serve: Serve, http: ClientSession, stream: bool, choices: int, tools: bool
) -> None:
    """Clients that send the deprecated ``functions`` read only this field."""
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    streams = stream or choices > 1
    pieces = {"tool_calls": [{"index": 0, **call}, {"index": 1, **call, "id": "c2"}]}
    events: list[dict[str, Any]] = [
        {"model": "x", "choices": [{"index": index, **fields}]}
        for index in range(choices)
        for fields in ({"delta": pieces}, {"delta": {}, "finish_reason": "tool_calls"})
    ]
    if not streams:
        message = {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]}
        events = [{"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}]
    service = ScriptedService(*events)
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    body = {"model": "demo", **HI, "n": choices, "stream": stream, "functions": [{"name": "get"}]}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": "other"}}]
    async with http.post(f"{url}{CHAT}", json=body) as answer:
        lines = (await answer.text()).replace("data: ", "").splitlines()
    found = [choice for line in lines if line.startswith("{") for choice in json.loads(line)["choices"]]
    messages = [choice.get("delta") or choice.get("message") or {} for choice in found]
    field, finish = ("tool_calls", "tool_calls") if tools else ("function_call", "function_call")
    calls = [message[field] for message in messages if field in message]
    assert len(calls) == choices
    assert all(not message.keys() & ({"tool_calls", "function_call"} - {field}) for message in messages)
    assert [choice["finish_reason"] for choice in found if choice.get("finish_reason")] == [finish] * choices
    if not tools:
        assert calls == [{"name": "get", "arguments": "{}"}] * choices
        assert call_of(service).body["parallel_tool_calls"] is False
