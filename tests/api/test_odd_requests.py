"""Unusual requests: accepted as by the official servers, or refused before a model is loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import anthropic
import pytest
from aiohttp import ClientSession

from sollold.api.http.response import KeepAlive
from sollold.serving.request import Engine, Waiting
from tests.api.api_parts import (
    CHAT,
    PlainLibrary,
    ScriptedPuller,
    ScriptedService,
    call_of,
    chunk,
    model,
    parts,
    text_service,
)
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, error_of, post, status_of

TOOL_MODEL = model(capabilities=("completion", "tools", "insert"))
USER = [{"role": "user", "content": "a"}]


def called(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "c0", "type": "function", "function": {"name": "get", "arguments": arguments}, **more}
    return [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "content": "noon"},
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ("", "{}"),
        ("  ", "{}"),
        (None, "{}"),
        ('{"a": 1}', '{"a": 1}'),
        ("{bro", '{"arguments":"{bro"}'),
        ("[1]", '{"arguments":[1]}'),
        ("null", "{}"),
    ],
)
async def test_arguments_of_earlier_calls_are_objects(
    serve: Serve, http: ClientSession, path: str, arguments: Any, sent: str
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    assert await status_of(http, url + path, body_of(path, "demo", called(arguments), stream=True)) == 200
    (call,) = call_of(service).body["messages"][1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == json.loads(sent)


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_accepts_invalid_arguments_of_earlier_calls(
    real: str, http: ClientSession, path: str
) -> None:
    for arguments in ("", "{bro", None):
        status, answer, _ = await post(http, real + path, body_of(path, "call", called(arguments)))
        assert status == 200, answer


TOOLS = {
    "without a type": {"function": {"name": "get"}},
    "without a description": {"type": "function", "function": {"name": "get", "description": None}},
    "flat": {"type": "function", "name": "get", "description": "x", "parameters": {"type": "object"}},
    "flat, as Anthropic's": {"name": "get", "input_schema": {"type": "object"}},
    "without parameters": {"type": "function", "function": {"name": "get", "parameters": None}},
    "with a schema as text": {
        "type": "function",
        "function": {"name": "get", "parameters": '{"type":"object"}'},
    },
    "true for a schema": {"type": "function", "function": {"name": "get", "parameters": True}},
}


@pytest.mark.llama
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_tools_in_unusual_forms_are_accepted(
    real: str, http: ClientSession, path: str, tool: str
) -> None:
    status, answer, _ = await post(http, real + path, body_of(path, "call", USER, tools=[TOOLS[tool]]))
    assert status == 200, answer


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"type": "function", "function": {"description": "x"}}, "tools[1] has no function name"),
        ({"type": "custom", "custom": {"name": "patch"}}, 'tools[1] is of type "custom"'),
        ({"type": "custom", "name": "patch"}, 'tools[1] ("patch") is of type "custom"'),
        ({"type": "web_search"}, 'tools[1] is of type "web_search"'),
        ({"type": "function", "function": {"name": "x", "parameters": 5}}, 'tools[1] ("x")'),
    ],
)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_other_tools_are_refused_by_name(
    serve: Serve, http: ClientSession, path: str, tool: dict[str, Any], message: str
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    valid = {"type": "function", "function": {"name": "get"}}
    status, answer, _ = await post(http, url + path, body_of(path, "demo", USER, tools=[valid, tool]))
    assert status == 400 and message in error_of(path, answer)
    assert not service.asks


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, body_of(path, "emb", USER)) for path in PATHS),
        ("/api/generate", {"model": "emb", "prompt": "a"}),
        ("/v1/completions", {"model": "emb", "prompt": "a"}),
    ],
)
async def test_chats_with_an_embedding_model_are_refused_without_a_load(
    serve: Serve, http: ClientSession, path: str, body: dict[str, Any]
) -> None:
    service = text_service()
    url = await serve(parts(service, model("emb:latest", capabilities=("embedding",))))
    status, answer, _ = await post(http, url + path, body)
    assert status == 400 and '"emb:latest" does not support' in error_of(path, answer)
    assert not service.asks


@pytest.mark.parametrize("stop", ["", [""], ["", "x"]])
async def test_empty_stop_sequences_are_ignored(serve: Serve, http: ClientSession, stop: Any) -> None:
    service = text_service()
    url = await serve(parts(service))
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "stop": stop, "stream": True}),
        ("/v1/completions", {"model": "demo", "prompt": "a", "stop": stop, "stream": True}),
        ("/api/chat", {**CHAT, "options": {"stop": stop}}),
    ):
        assert await status_of(http, url + path, body) == 200
        assert call_of(service).body.get("stop") == (["x"] if "x" in stop else None)


async def test_numbers_as_strings_or_floats_are_converted(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    body = {"max_tokens": "5", "temperature": "0.1", "seed": 1.0, "top_p": 1, "n": "1", "stream": "true"}
    for path, more in (("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "demo", "prompt": "a"})):
        assert await status_of(http, url + path, {**more, **body}) == 200
        sent = call_of(service).body
        assert (sent["max_tokens"], sent["temperature"], sent["seed"], sent["stream"]) == (5, 0.1, 1, True)
        assert all(type(sent[name]) is int for name in ("max_tokens", "seed", "n"))
        assert await status_of(http, url + path, {**more, "max_tokens": "many"}) == 400
    options = {"num_predict": 8.5, "top_k": "3", "temperature": "0.1"}
    assert await status_of(http, f"{url}/api/chat", {**CHAT, "options": options}) == 200
    assert (call_of(service).body["n_predict"], call_of(service).body["top_k"]) == (8, 3)
    assert await status_of(http, f"{url}/api/chat", {**CHAT, "options": {"num_predict": 0}}) == 200
    assert call_of(service).body["n_predict"] == -1


async def test_empty_fields_are_ignored(serve: Serve, http: ClientSession) -> None:
    """Clients in Go (such as ``ollama run``) send zero values, as they can't omit fields."""
    service = text_service()
    url = await serve(parts(service, model(system="Be kind")))
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": "hi",
        "suffix": "",
        "system": "",
        "template": "",
        "format": "",
        "think": "",
    }
    body |= {"context": None, "keep_alive": "", "options": {}, "images": []}
    async with http.post(f"{url}/api/generate", json=body) as answer:
        lines = [json.loads(line) async for line in answer.content]
    assert "".join(line["response"] for line in lines) == "a"
    assert call_of(service).body["messages"] == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "hi"},
    ]
    async with http.post(f"{url}/api/generate", json={**body, "prompt": ""}) as answer:
        assert (await answer.json())["done_reason"] == "load"


@pytest.mark.parametrize("path", ["//api/chat", "/api//chat/", "/api/chat/", "/v1//api/chat"])
async def test_extra_slashes_are_ignored(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService({"choices": []})
    url = await serve(parts(service), bodies=500)
    # Each request releases its part of the memory budget.
    for _ in range(5):
        assert await status_of(http, url + path, {**CHAT, "stream": False, "padding": "x" * 200}) == 200
    async with http.get(f"{url}//v1//models/") as answer:
        assert (await answer.json())["object"] == "list"
    async with http.get(f"{url}//api/tags?x=1") as answer:
        assert answer.status == 200
    async with http.get(f"{url}//v1/nothing/") as answer:
        assert answer.status == 404 and "message" in (await answer.json())["error"]
    async with http.get(f"{url}//v1/chat/completions") as answer:
        assert answer.status == 405 and answer.headers["Allow"] == "POST"


async def test_keys_ignore_case_and_invalid_utf8_is_replaced_as_in_go(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service()
    url = await serve(parts(service))
    body = b'{"Model":"demo","MESSAGES":[{"Role":"user","Content":"a \xff\xfe b \xc3\xa9"}],"Stream":true}'
    async with http.post(f"{url}/api/chat", data=body) as answer:
        assert answer.status == 200
    assert call_of(service).body["messages"] == [{"role": "user", "content": "a \ufffd\ufffd b é"}]


async def test_a_load_sends_keepalive_whitespace_then_one_object(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    service.gate = asyncio.Event()
    service.waitings = [Waiting("loading", 0.4)]
    url = await serve(parts(service), KeepAlive(grace=0.01, every=0.01))
    async with http.post(f"{url}/api/generate", json={"model": "demo"}) as answer:
        assert answer.content_type == "application/json"
        assert (await answer.content.read(2)).isspace()
        service.gate.set()
        record = json.loads(await answer.read())
    assert record["done"] is True and record["done_reason"] == "load"


async def test_errors_have_the_texts_that_ollamas_clients_match(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(puller=ScriptedPuller({"status": "success"})))
    for path, body, status, message in (
        ("/api/chat", {"model": "x", "messages": USER}, 404, "model 'x' not found"),
        ("/api/generate", {"prompt": "a"}, 404, "model '' not found"),
        ("/api/chat", {"messages": USER}, 400, "model is required"),
        ("/api/embed", {"model": "x", "input": "a"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/embeddings", {"model": "x", "prompt": "a"}, 404, 'model "x" not found, try pulling it first'),
    ):
        actual_status, answer, _ = await post(http, url + path, body)
        assert actual_status == status and message in answer["error"], body
    rule = "may have only letters, digits, '.', '_' and '-', and not begin with '.' or '-'"
    for name, why in (
        ("a b", f"'a b' {rule}"),
        ("x/a b:1", f"'a b' in 'x/a b:1' {rule}"),
        ("a/b/c/d", "'a/b/c/d' is not of the form [host/][namespace/]model[:tag]"),
        ("a:", "a part of 'a:' is empty"),
    ):
        actual_status, answer, _ = await post(http, f"{url}/api/pull", {"model": name})
        assert (actual_status, answer) == (400, {"error": f"invalid model name: {why}"})
    more: dict[str, Any]
    for more in ({}, {"input": None}, {"input": []}):
        status, answer, _ = await post(http, f"{url}/api/embed", {"model": "demo", **more})
        assert (status, answer) == (200, {"model": "demo", "embeddings": []})
    assert (await post(http, f"{url}/api/me", {}))[0] == 401
    assert (await post(http, f"{url}/api/signout", {}))[0] == 200
    async with http.get(f"{url}/api/status") as answer:
        assert (await answer.json())["cloud"]["disabled"] is True


async def test_an_empty_text_among_others_is_left_to_the_engine_as_in_ollama(
    serve: Serve, http: ClientSession
) -> None:
    """Most models for embeddings embed it, since their tokenizers add tokens. OpenAI's API refuses it."""
    vectors = [{"index": n, "embedding": [1.0, 0.0]} for n in range(2)]
    service = ScriptedService({"data": vectors, "usage": {"prompt_tokens": 5}})
    url = await serve(parts(service))
    body = {"model": "demo", "input": ["one", ""]}
    status, answer, _ = await post(http, f"{url}/api/embed", body)
    assert (status, len(answer["embeddings"])) == (200, 2)
    assert service.asks[-1].calls[Engine.LLAMA].body["input"] == ["one", ""]
    status, answer, _ = await post(http, f"{url}/v1/embeddings", body)
    assert status == 400 and "empty" in answer["error"]["message"]


async def test_answers_have_the_requested_model_name(serve: Serve, http: ClientSession) -> None:
    alias = {**chunk('the "model":"alias"'), "model": "alias"}
    service = ScriptedService(alias, {**chunk(finish="stop"), "model": "alias"})
    url = await serve(parts(service))
    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        events = [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]
    assert [event["model"] for event in events] == ["demo", "demo"]
    assert events[0]["choices"][0]["delta"]["content"] == 'the "model":"alias"'
    service.events = (
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}], "model": "x"},
    )
    _, whole, _ = await post(http, f"{url}/v1/chat/completions", CHAT)
    assert whole["model"] == "demo"
    # Required by OpenAI's schema.
    assert whole["choices"][0]["logprobs"] is None and whole["choices"][0]["message"]["refusal"] is None


async def test_models_have_the_form_of_the_client_that_asks(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    headers = {"anthropic-version": "2023-06-01"}
    async with http.get(f"{url}/v1/models", headers=headers) as answer:
        listed = await answer.json()
    assert listed["data"][0]["type"] == "model" and listed["has_more"] is False
    assert listed["first_id"] == listed["last_id"] == "demo:latest"
    async with http.get(f"{url}/v1/models/demo", headers=headers) as answer:
        shown = await answer.json()
    assert shown["display_name"] == "demo:latest" and shown["created_at"].endswith("Z")


async def test_anthropics_client_gets_pages_of_models_and_errors_in_its_form(serve: Serve) -> None:
    names = [f"m{number}:latest" for number in range(7)]
    url = await serve(parts(library=PlainLibrary(*(model(name) for name in names))))
    async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-mine", max_retries=0) as client:

        async def ids(**query: Any) -> tuple[list[str], bool]:
            page = await client.models.list(**query)
            for entry in page.data:
                # The client does not check the fields of an answer.
                type(entry).model_validate(entry.to_dict())
            return [entry.id for entry in page.data], bool(page.has_more)

        assert await ids() == (names, False)
        assert await ids(limit=3) == (names[:3], True)
        assert await ids(limit=3, after_id=names[2]) == (names[3:6], True)
        assert await ids(limit=3, after_id=names[5]) == (names[6:], False)
        assert await ids(limit=2, before_id=names[3]) == (names[1:3], True)
        assert await ids(limit=9, before_id=names[3]) == (names[:3], False)
        assert [entry.id async for entry in client.models.list(limit=2)] == names
        with pytest.raises(anthropic.BadRequestError, match="after_id: there is no model 'none'"):
            await ids(after_id="none")
        for wrong in (0, 1001):
            with pytest.raises(anthropic.BadRequestError, match="limit must be"):
                await ids(limit=wrong)
        requests: list[Awaitable[Any]] = [
            client.models.retrieve("none"),
            client.get("/v1/files", cast_to=object),
        ]
        for request in requests:
            with pytest.raises(anthropic.NotFoundError) as refused:
                await request
            assert isinstance(refused.value.body, dict) and refused.value.body["type"] == "error"


async def test_deprecated_fields_work_and_unsupported_ones_warn_or_are_refused(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    path = f"{url}/v1/chat/completions"
    old = {
        **CHAT,
        "stream": True,
        "functions": [{"name": "a"}, {"name": "b"}],
        "function_call": {"name": "b"},
    }
    assert await status_of(http, path, old) == 200
    sent = service.asks[0].calls[Engine.LLAMA].body
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["b"] and sent["tool_choice"] == "required"
    assert "functions" not in sent and "function_call" not in sent
    async with http.post(path, json={**CHAT, "stream": True, "web_search_options": {}}) as answer:
        assert answer.status == 200 and "web search" in answer.headers["X-Sollold-Warning"]
    status, answer, _ = await post(http, path, {**CHAT, "modalities": ["text", "audio"]})
    assert status == 400 and "audio" in error_of("/v1", answer)
    assert await status_of(http, path, {**CHAT, "stream": True, "modalities": ["text"]}) == 200
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    body = {"model": "demo", "messages": [{"role": "user", "content": [sound]}]}
    status, answer, _ = await post(http, path, body)
    assert status == 400 and "does not support audio input" in error_of("/v1", answer)


async def test_a_response_has_usage_from_its_first_event(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(text_service()))
    async with http.post(
        f"{url}/v1/responses", json={"model": "demo", "input": "a", "stream": True}
    ) as answer:
        events = [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]
    assert events[0]["response"]["usage"]["total_tokens"] == 0
    usage = events[-1]["response"]["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["total_tokens"] == 9
