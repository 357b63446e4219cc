"""Bodies sent to Ollama: rewritten where it would refuse or ignore what llama.cpp accepts."""

from __future__ import annotations

import base64
import itertools
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.errors import Fault, Refusal
from sollold.serving.request import Ask, Call, Engine
from tests.api.api_parts import (
    BODIES,
    ScriptedService,
    call_of,
    chunk,
    model,
    parts,
    text_service,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, error_of, post
from tests.api.picture import png

TOOL_MODEL = model(capabilities=("completion", "tools", "vision", "thinking"))
USER = [{"role": "user", "content": "a"}]
PICTURE = base64.b64encode(png()).decode()


async def call_for_ollama(
    serve: Serve, http: ClientSession, path: str, body: Any, served: Any = TOOL_MODEL
) -> Call:
    service = text_service()
    url = await serve(parts(service, served))
    async with http.post(url + path, json={"model": "demo", "stream": True, **body}) as answer:
        assert answer.status == 200, await answer.text()
    return call_of(service, Engine.OLLAMA)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (
            {"num_ctx": "4096", "seed": 1.0, "temperature": "0.1"},
            {"num_ctx": 4096, "seed": 1, "temperature": 0.1},
        ),
        ({"num_ctx": 0}, {}),
        ({"num_ctx": -1, "top_k": 3.0}, {"top_k": 3}),
        ({"num_ctx": None, "stop": "x"}, {"stop": ["x"]}),
        ({"stop": "", "num_gpu": 3}, {"num_gpu": 3}),
        ({"stop": ["", "y"]}, {"stop": ["y"]}),
    ],
)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_options_have_the_types_that_ollama_requires(
    serve: Serve, http: ClientSession, path: str, options: dict[str, Any], sent: dict[str, Any]
) -> None:
    call = await call_for_ollama(serve, http, path, {"messages": USER, "prompt": "a", "options": options})
    assert call.body["options"] == sent
    assert all(type(call.body["options"][name]) is type(value) for name, value in sent.items())


@pytest.mark.parametrize(
    ("field", "value", "sent"),
    [
        ("think", "", None),
        ("think", "True", True),
        ("think", "none", False),
        ("think", "High", "high"),
        ("format", "", None),
        ("format", '{"type":"object"}', {"type": "object"}),
        ("stream", "true", True),
        ("priority", 5, None),
        ("timeout", "5", None),
    ],
)
async def test_fields_have_the_types_that_ollama_requires(
    serve: Serve, http: ClientSession, field: str, value: Any, sent: Any
) -> None:
    call = await call_for_ollama(serve, http, "/api/chat", {"messages": USER, field: value})
    assert call.body.get(field) == sent and (sent is not None or field not in call.body)


@pytest.mark.parametrize("invalid", [5, "x", {"a": 1}, ["x"], [5], [[{}]], True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [("/api/generate", ("messages", "tools")), ("/api/chat", ("images", "prompt", "suffix"))],
)
async def test_unknown_fields_of_a_route_are_not_validated(
    serve: Serve, http: ClientSession, path: str, fields: tuple[str, ...], invalid: Any
) -> None:
    known = {"messages": USER} if path == "/api/chat" else {"prompt": "a"}
    call = await call_for_ollama(serve, http, path, {**known, **dict.fromkeys(fields, invalid)})
    assert all(call.body[name] == value for name, value in known.items())


async def test_messages_have_the_form_that_ollama_requires(serve: Serve, http: ClientSession) -> None:
    pictures = [f"data:image/png;base64,{PICTURE}", f" {PICTURE[:9]}\n{PICTURE[9:]}"]
    function = {"name": "f", "arguments": '{"x":1}'}
    messages = [
        {"role": "User", "content": "a", "images": pictures},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "function", "name": "f", "content": "noon"},
        {"role": "", "content": "b"},
    ]
    call = await call_for_ollama(serve, http, "/api/chat", {"messages": messages})
    user, assistant, result, last = call.body["messages"]
    assert user == {"role": "user", "content": "a", "images": [PICTURE, PICTURE]}
    assert assistant["content"] == "" and assistant["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {"x": 1},
    }
    assert result == {"role": "tool", "name": "f", "tool_name": "f", "content": "noon"}
    assert last["role"] == "user"


@pytest.mark.parametrize("path", PATHS[1:])
async def test_ollama_applies_its_own_modelfile(serve: Serve, http: ClientSession, path: str) -> None:
    """Ollama adds its SYSTEM, MESSAGEs and most PARAMETERs on each route, so they must not be sent too."""
    configured = replace(
        TOOL_MODEL, system="SYS", messages=(("user", "u"), ("assistant", "v")), params='{"top_k":1}'
    )
    body = body_of(path, "demo", USER)
    del body["temperature"]
    call = await call_for_ollama(serve, http, path, {**body, "stream": True}, configured)
    assert [message["content"] for message in call.body["messages"]] == ["a"]
    assert "top_k" not in call.body


@pytest.mark.parametrize("system", ["", [], [{"type": "text", "text": ""}], None])
async def test_an_empty_system_text_does_not_override_the_modelfile(
    serve: Serve, http: ClientSession, system: Any
) -> None:
    service = text_service()
    url = await serve(parts(service, replace(TOOL_MODEL, system="SYS")))
    body = {**body_of("/v1/messages", "demo", USER, stream=True), "system": system}
    async with http.post(f"{url}/v1/messages", json=body) as answer:
        assert answer.status == 200
    assert call_of(service).body["messages"][0] == {"role": "system", "content": "SYS"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_the_developer_role_becomes_system_for_ollama(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """Its templates would drop messages with the role ``developer``."""
    messages = [*USER, {"role": "developer", "content": "d"}, {"role": "user", "content": "b"}]
    call = await call_for_ollama(serve, http, path, {**body_of(path, "demo", messages), "stream": True})
    assert [message["role"] for message in call.body["messages"]] == ["user", "system", "user"]


async def test_a_chat_is_normalized_for_ollama(serve: Serve, http: ClientSession) -> None:
    path = "/v1/chat/completions"
    call = await call_for_ollama(
        serve, http, path, {"messages": [{"role": "user"}], "stop": "", "top_logprobs": 0}
    )
    assert call.body["messages"] == [{"role": "user", "content": ""}]
    assert "stop" not in call.body and "top_logprobs" not in call.body
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    call = await call_for_ollama(serve, http, path, {"messages": USER, "tools": tools, "tool_choice": "none"})
    assert "tools" not in call.body and not call.notes
    chosen = {"tool_choice": {"type": "function", "function": {"name": "g"}}, "n": 2, "logit_bias": {"5": 1}}
    call = await call_for_ollama(serve, http, path, {"messages": USER, "tools": tools, **chosen})
    assert [tool["function"]["name"] for tool in call.body["tools"]] == ["g"]
    assert [note.split()[0] for note in call.notes] == ["logit_bias", "n", "tool_choice"]


@pytest.mark.parametrize(
    "parts_",
    [
        ["a"],
        [{"text": "a"}],
        [{"type": "input_text", "text": "a"}],
        [{"type": "output_text", "text": "a", "annotations": []}],
        [{"type": "refusal", "refusal": "a"}],
        {"type": "text", "text": "a"},
    ],
)
async def test_text_parts_of_any_form_are_normalized(serve: Serve, http: ClientSession, parts_: Any) -> None:
    service = text_service()
    url = await serve(parts(service))
    body = {"model": "demo", "messages": [{"role": "user", "content": parts_}], "stream": True}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
    sent = [call_of(service, engine).body["messages"] for engine in (Engine.LLAMA, Engine.OLLAMA)]
    assert [message["content"] for (message,) in sent] == [[{"type": "text", "text": "a"}], "a"]


@pytest.mark.parametrize(
    "url_",
    [
        f"data:image/png;base64,{PICTURE}",
        f"data:application/octet-stream;base64,{PICTURE}",
        f"DATA:image/PNG;BASE64,{PICTURE}",
        f"data:;base64,{PICTURE}",
        f" data:image/jpeg;name=x;base64,{PICTURE[:7]}\r\n{PICTURE[7:]} ",
        f"data:image/png;base64,{PICTURE.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png()).decode()}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_image_urls_are_normalized(serve: Serve, http: ClientSession, path: str, url_: str) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url_}}
    body: dict[str, Any] = {
        "model": "demo",
        "stream": True,
        "messages": [{"role": "user", "content": [part]}],
    }
    if path == "/v1/responses":
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url_}]}
        body = {"model": "demo", "stream": True, "input": [item]}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
    for engine in Engine:
        (sent,) = call_of(service, engine).body["messages"][0]["content"]
        assert sent["image_url"]["url"] == f"data:image/png;base64,{PICTURE}"


@pytest.mark.parametrize(
    "url_", ["data:image/svg+xml;utf8,<svg/>", "data:image/png;base64,", "file:///x", None, 5]
)
async def test_invalid_images_are_refused(serve: Serve, http: ClientSession, url_: Any) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    content = [{"type": "image_url", "image_url": {"url": url_}}]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}]}
    status, answer, _ = await post(http, f"{url}/v1/chat/completions", body)
    assert status == 400 and "image" in error_of("/v1", answer)
    assert not service.asks


async def test_token_inputs_of_embeddings_are_not_sent_to_ollama(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService({"object": "list", "data": [{"embedding": [1.0], "index": 0}]})
    url = await serve(parts(service, model(capabilities=("embedding",))))
    for texts, supported in (("a", True), (["a", "b"], True), ([1, 2], False), ([[1], [2]], False)):
        body = {"model": "demo", "input": texts, "encoding_format": "", "dimensions": "1"}
        status, answer, _ = await post(http, f"{url}/v1/embeddings", body)
        assert status == 200, answer
        assert (Engine.OLLAMA in service.asks[-1].calls) is supported
    service = ScriptedService({"embeddings": [[1.0]]}, engine=Engine.OLLAMA)
    url = await serve(parts(service, model(capabilities=("embedding",))))
    await post(http, f"{url}/api/embed", {"model": "demo", "input": "a", "dimensions": "8"})
    assert call_of(service, Engine.OLLAMA).body["dimensions"] == 8


class RefusingTemplates(ScriptedService):
    """Refuses consecutive messages of the same role, as strict templates do, with any engine."""

    async def open(self, ask: Ask, on_wait: Any) -> Any:
        roles = [message["role"] for message in ask.calls[self.engine].body["messages"]]
        if any(role == other for role, other in itertools.pairwise(roles)):
            raise Refusal(Fault.ENGINE, "Error: Jinja Exception: roles must alternate", status=400)
        return await super().open(ask, on_wait)


@pytest.mark.parametrize("path", PATHS)
async def test_messages_are_merged_for_a_refusing_template_of_ollama(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = RefusingTemplates(chunk("a"), chunk(finish="stop"), usage_chunk(), engine=Engine.OLLAMA)
    if path == "/api/chat":
        service.events = ({"message": {"content": "a"}, "done": True, "prompt_eval_count": 3},)
    url = await serve(parts(service, TOOL_MODEL))
    messages = [*USER, {"role": "user", "content": "b"}]
    async with http.post(url + path, json=body_of(path, "demo", messages, stream=True)) as answer:
        assert answer.status == 200 and "merged" in answer.headers["X-Sollold-Warning"]
    (sent,) = call_of(service, Engine.OLLAMA).body["messages"]
    assert sent["content"] == "a\n\nb"


class LosingPictures(ScriptedService):
    async def open(self, ask: Ask, on_wait: Any) -> Any:
        if ask.calls[Engine.LLAMA].body.get("cache_prompt") is not False:
            raise Refusal(Fault.ENGINE, "got exception: Chunk not found", status=502)
        return await super().open(ask, on_wait)


async def test_a_stale_cached_image_is_retried_without_the_cache(serve: Serve, http: ClientSession) -> None:
    service = LosingPictures(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, TOOL_MODEL))
    async with http.post(f"{url}/api/chat", json={"model": "demo", "messages": USER}) as answer:
        assert answer.status == 200 and b'"done":true' in await answer.read()


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "g"}},
        {"type": "function", "name": "g"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "g"}}]},
        },
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_tool_choice_limits_the_tools(
    serve: Serve, http: ClientSession, path: str, choice: Any
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    body = {**body_of(path, "demo", USER, stream=True), "tools": tools, "tool_choice": choice}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
    sent = service.asks[0].calls[Engine.LLAMA].body
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["g"] and sent["tool_choice"] == "required"
    for invalid in ("bogus", {"type": "function", "name": "h"}, {"type": "allowed_tools"}):
        status, refusal, _ = await post(http, url + path, {**body, "tool_choice": invalid})
        assert status == 400 and "tool_choice" in error_of(path, refusal)


async def test_an_unenforceable_schema_is_accepted_if_only_ollama_answers(
    serve: Serve, http: ClientSession
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://elsewhere.example/a.json"}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    body = {"response_format": format_, "messages": USER}
    call = await call_for_ollama(
        serve, http, "/v1/chat/completions", body, replace(TOOL_MODEL, only_ollama="No files.")
    )
    assert call.body["response_format"] == format_
    url = await serve(parts(text_service(), TOOL_MODEL))
    status, refusal, _ = await post(http, url + "/v1/chat/completions", {"model": "demo", **body})
    assert status == 400 and "strict" in error_of("/v1/chat/completions", refusal)


async def test_ollama_counts_tokens_if_only_it_can(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService({"choices": [], "usage": {"prompt_tokens": 7}}, engine=Engine.OLLAMA)
    url = await serve(parts(service, replace(TOOL_MODEL, only_ollama="No files.")))
    status, answer, _ = await post(
        http, f"{url}/v1/messages/count_tokens", {"model": "demo", "messages": USER}
    )
    assert (status, answer) == (200, {"input_tokens": 7})
    assert call_of(service, Engine.OLLAMA).body["max_tokens"] == 1


async def test_unsupported_items_of_a_response_cause_a_warning_or_are_refused(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service()
    url = f"{await serve(parts(service, TOOL_MODEL))}/v1/responses"
    items: list[Any] = [{"type": "mcp_list_tools", "tools": []}, {"role": "user", "content": None}, *USER]
    async with http.post(url, json={"model": "demo", "input": items, "stream": True}) as answer:
        assert answer.status == 200 and "MCP" in answer.headers["X-Sollold-Warning"]
        stored = [line async for line in answer.content if b"response.completed" in line]
    assert stored
    first = (await post(http, url, {"model": "demo", "input": "a"}))[1]
    references = [{"type": "item_reference", "id": first["output"][0]["id"]}, *USER]
    status, _, headers = await post(http, url, {"model": "demo", "input": references})
    assert status == 200 and "X-Sollold-Warning" not in headers
    for name in ("conversation", "prompt"):
        status, refusal, _ = await post(http, url, {"model": "demo", "input": "a", name: "x"})
        assert status == 400 and name in refusal["error"]["message"]


async def test_the_parts_of_a_result_stay_one_message_for_an_ollama(
    serve: Serve, http: ClientSession
) -> None:
    """An Ollama makes a message of each part, without the id of the call."""
    service = text_service()
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    result = {
        "role": "tool",
        "tool_call_id": "c1",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    }
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}, result]
    body = {"model": "demo", "stream": True, "messages": messages}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
    assert call_of(service, Engine.OLLAMA).body["messages"][2] == {**result, "content": "one\ntwo"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions"])
async def test_an_ollama_keeps_the_models_own_temperature(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """On its /v1 an Ollama takes 1.0 for a temperature or top_p that is missing, whatever the model has."""
    service = text_service()
    params = '{"temperature":0.3,"top_p":"odd","presence_penalty":0.5,"top_k":9}'
    insert = {"suffix": "b"} if path == "/v1/completions" else {}
    url = await serve(parts(service, model(capabilities=("completion", "insert"), params=params)))
    for more, temperature in (({}, 0.3), ({"temperature": 0.9}, 0.9)):
        async with http.post(url + path, json={**BODIES[path], "stream": True, **insert, **more}) as answer:
            assert answer.status == 200, await answer.text()
        sent = call_of(service, Engine.OLLAMA).body
        assert (sent["temperature"], sent["presence_penalty"]) == (temperature, 0.5)
        assert "top_p" not in sent and "top_k" not in sent
