"""Quirks of clients: wrong prefixes in base URLs, byte order marks, nulls, fields of other dialects."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import CHAT, ScriptedService, call_of, model, parts, text_service
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, error_of, post, status_of
from tests.api.reciters import TOOL

USER = [{"role": "user", "content": "a"}]
TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))


@pytest.mark.parametrize("path", PATHS)
async def test_base_urls_with_wrong_prefixes_work(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(text_service()))
    bare = path.removeprefix("/v1")
    odd_paths = [f"/api{path}", f"/v1{path}", f"/v1/v1{path}", f"/v1{path}/"]
    odd_paths += [f"/ollama{path}", f"/api/codex{path}", f"/openai{path}", f"/anthropic{path}"]
    odd_paths += [] if bare == path else [bare, f"{bare}/", f"/{bare}"]
    for odd_path in odd_paths:
        body = body_of(path, "demo", USER, stream=True)
        assert await status_of(http, url + odd_path, body) == 200, odd_path
        status, answer, _ = await post(http, url + odd_path, body_of(path, "missing", USER))
        assert status == 404 and "missing" in error_of(path, answer), odd_path


async def test_models_are_listed_under_any_prefix(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    for path in ("/models", "/v1/v1/models", "/api/v1/models", "/models/demo", "/v1/v1/models/demo"):
        # A single model has the requested name.
        name = "demo" if path.endswith("/demo") else "demo:latest"
        async with http.get(url + path) as answer:
            assert answer.status == 200 and f'"id":"{name}"' in await answer.text(), path
    for path in ("/v1/chat", "/modelsx", "/v1/v1", "/v1/v1/nothing"):
        async with http.get(url + path) as answer:
            assert answer.status == 404, path


async def test_a_base_url_that_ends_in_v1_is_accepted_for_llama_servers_own_paths(
    serve: Serve, http: ClientSession
) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/v1/health") as answer:
        assert answer.status == 200
    for path in ("/v1/tokenize", "/v1/infill", "/v1/apply-template", "/v1/v1/detokenize"):
        async with http.post(f"{url}{path}", json={"model": "none"}) as answer:
            message = (await answer.json())["error"]["message"]
            assert "unknown path" not in message, (path, message)


@pytest.mark.parametrize(
    ("path", "instead"),
    [("/props", "/api/show"), ("/api/v0/models", "/v1/models"), ("/completion", "/v1/completions")],
)
async def test_paths_of_other_servers_are_answered_with_what_replaces_them(
    serve: Serve, http: ClientSession, path: str, instead: str
) -> None:
    url = await serve(parts())
    async with http.get(url + path) as answer:
        assert answer.status == 404 and f"use {instead}" in await answer.text()


@pytest.mark.parametrize("path", PATHS)
async def test_a_byte_order_mark_is_ignored(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    raw = b"\xef\xbb\xbf" + json.dumps(body_of(path, "demo", USER, stream=True)).encode()
    async with http.post(url + path, data=raw) as answer:
        assert answer.status == 200
    async with http.post(url + path, data=b"\xef\xbb\xbf") as answer:
        assert answer.status == 400


@pytest.mark.parametrize("path", PATHS)
async def test_a_null_model_is_missing(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(text_service()))
    status, answer, _ = await post(http, url + path, {**body_of(path, "demo", USER), "model": None})
    assert status == 400 and error_of(path, answer) == "model is required"


async def test_null_fields_of_ollamas_clients_are_ignored(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    message = {"role": None, "content": "a", "thinking": None, "images": None, "tool_calls": None}
    assert await status_of(http, f"{url}/api/chat", {**CHAT, "messages": [message]}) == 200
    for engine in Engine:
        (sent,) = call_of(service, engine).body["messages"]
        assert sent["role"] == "user" and None not in sent.values()
    status, details, _ = await post(http, f"{url}/api/show", {"model": None, "name": "demo"})
    assert status == 200 and details["details"]


async def test_max_tokens_precedes_max_completion_tokens_on_each_engine(
    serve: Serve, http: ClientSession
) -> None:
    service = text_service()
    url = await serve(parts(service))
    body = {**CHAT, "stream": True, "max_tokens": 3, "max_completion_tokens": 5}
    assert await status_of(http, f"{url}/v1/chat/completions", body) == 200
    for engine in Engine:
        sent = call_of(service, engine).body
        assert sent["max_tokens"] == 3 and "max_completion_tokens" not in sent
    del body["max_tokens"]
    assert await status_of(http, f"{url}/v1/chat/completions", body) == 200
    assert call_of(service).body["max_completion_tokens"] == 5
    assert call_of(service, Engine.OLLAMA).body["max_tokens"] == 5


@pytest.mark.parametrize("path", PATHS)
async def test_a_huge_limit_is_clamped(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    limits: dict[str, dict[str, Any]] = {
        "/api/chat": {"options": {"num_predict": 10**12}},
        "/v1/responses": {"max_output_tokens": 10**12},
    }
    more = limits.get(path, {"max_tokens": 10**12})
    assert await status_of(http, url + path, body_of(path, "demo", USER, stream=True, **more)) == 200
    sent = call_of(service).body
    assert sent.get("max_tokens", sent.get("n_predict")) == 2**31 - 1


@pytest.mark.parametrize(
    ("reasoning", "effort"),
    [
        ({"effort": "low"}, "low"),
        ({"effort": "none"}, "none"),
        ({"enabled": False}, "none"),
        ({"enabled": True}, None),
        ({"effort": None, "max_tokens": 100}, None),
        (None, None),
        ("high", None),
    ],
)
async def test_an_effort_may_be_in_a_reasoning_object(
    serve: Serve, http: ClientSession, reasoning: Any, effort: str | None
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    path = f"{url}/v1/chat/completions"
    assert await status_of(http, path, {**CHAT, "stream": True, "reasoning": reasoning}) == 200
    for engine in Engine:
        sent = call_of(service, engine).body
        assert sent.get("reasoning_effort") == effort and "reasoning" not in sent
    named = {**CHAT, "stream": True, "reasoning": reasoning, "reasoning_effort": "medium"}
    assert await status_of(http, path, named) == 200
    assert call_of(service).body["reasoning_effort"] == "medium"


EFFORTS = [
    *(("minimal", "low"), ("xhigh", "high"), ("ultra", "high"), ("max", "high")),
    *(("medium", "medium"), ("none", "none")),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(("effort", "sent"), EFFORTS)
async def test_efforts_are_mapped_for_each_engine(
    serve: Serve, http: ClientSession, path: str, effort: str, sent: str
) -> None:
    """Agents send xhigh and ultra, which an older Ollama refuses."""
    service = text_service()
    more: dict[str, Any] = {
        "/v1/responses": {"reasoning": {"effort": effort}},
        "/v1/messages": {"output_config": {"effort": effort}, "thinking": {"type": "adaptive"}},
    }.get(path, {"reasoning_effort": effort})
    url = await serve(parts(service, TOOL_MODEL, model("plain:latest")))
    assert await status_of(http, url + path, body_of(path, "demo", USER, stream=True, **more)) == 200
    assert call_of(service).body["reasoning_effort"] == sent
    sent_to_ollama = call_of(service, Engine.OLLAMA).body["reasoning_effort"]
    assert sent_to_ollama == (effort if effort == "max" else sent)
    # A model without thinking gets no effort.
    assert await status_of(http, url + path, body_of(path, "plain", USER, stream=True, **more)) == 200
    assert "reasoning_effort" not in call_of(service, Engine.OLLAMA).body


@pytest.mark.llama
@pytest.mark.clients
@pytest.mark.parametrize("name", ["think", "demo"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_ollama_answers_codex(at_ollama: str, http: ClientSession, path: str, name: str) -> None:
    effort: dict[str, Any] = {"reasoning_effort": "xhigh"}
    more = effort if "chat" in path else {"reasoning": {"effort": "xhigh", "summary": "auto"}}
    status, answer, _ = await post(http, at_ollama + path, body_of(path, name, USER, **more))
    assert status == 200, answer


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("any", "required"),
        ("", "auto"),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "get_time"}, "required"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_tool_choices_of_other_dialects_are_mapped(
    serve: Serve, http: ClientSession, path: str, choice: Any, sent: str
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    body = body_of(path, "demo", USER, stream=True, tools=[TOOL], tool_choice=choice)
    assert await status_of(http, url + path, body) == 200
    assert call_of(service).body["tool_choice"] == sent
    for wrong in ("sometimes", {"type": "web_search"}, {"type": "function", "name": "other"}):
        status, answer, _ = await post(http, url + path, {**body, "tool_choice": wrong})
        assert status == 400 and "tool_choice" in error_of(path, answer)


async def test_a_chat_may_have_input_instead_of_messages(serve: Serve, http: ClientSession) -> None:
    """Cursor sends this to models that it believes to need the newer API."""
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    called = {"type": "function_call", "call_id": "c", "name": "get_time", "arguments": "{}"}
    body = {
        "model": "demo",
        "stream": True,
        "instructions": "Be kind.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            called,
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
        ],
        "tools": [{"type": "function", **TOOL["function"]}],  # type: ignore[dict-item]
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "store": False,
        "max_output_tokens": 9,
    }
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200 and "[DONE]" in await answer.text()
    for engine in Engine:
        sent = call_of(service, engine).body
        assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "tool"]
        assert sent["reasoning_effort"] == "low" and sent["tools"][0]["function"]["name"] == "get_time"
        assert sent.get("max_tokens", sent.get("max_completion_tokens")) == 9
        assert not {"input", "instructions", "text", "include"} & set(sent)
    status, answer_, _ = await post(http, f"{url}/v1/chat/completions", {"model": "demo", "input": []})
    assert status == 400 and "messages is required" in answer_["error"]["message"]


def node_buffer(raw: bytes) -> dict[str, Any]:
    return {"type": "Buffer", "data": list(raw)}


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("image", [base64.b64encode(PNG).decode(), list(PNG), node_buffer(PNG)])
async def test_an_image_may_be_a_nodejs_buffer(serve: Serve, http: ClientSession, image: Any) -> None:
    """Ollama's provider for the AI SDK sends buffers unchanged."""
    service = text_service()
    url = await serve(parts(service, model(capabilities=("completion", "vision"))))
    messages = [{"role": "user", "content": "a", "images": [image]}]
    for path, body in (
        ("/api/chat", {"model": "demo", "messages": messages}),
        ("/api/generate", {"model": "demo", "prompt": "a", "images": [image]}),
    ):
        assert await status_of(http, url + path, body) == 200
        image_url = call_of(service).body["messages"][0]["content"][1]["image_url"]["url"]
        assert base64.b64decode(image_url.split(",")[1]) == PNG
        sent_to_ollama = call_of(service, Engine.OLLAMA).body
        assert (
            sent_to_ollama["images"]
            if "images" in sent_to_ollama
            else sent_to_ollama["messages"][0]["images"]
        ) == [base64.b64encode(PNG).decode()]
    for wrong in ({"type": "Buffer"}, [256], ["a"], {"0": 1}, 5, []):
        body = {"model": "demo", "prompt": "a", "images": [wrong]}
        status, answer, _ = await post(http, f"{url}/api/generate", body)
        assert status == 400 and "image" in answer["error"], wrong


@pytest.mark.parametrize("dimensions", [None, 2])
async def test_vectors_are_base64_on_request(
    serve: Serve, http: ClientSession, dimensions: int | None
) -> None:
    """openai's npm package always requests base64; older versions of Ollama send lists."""
    vectors = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8, 0.0]}]
    service = ScriptedService({"object": "list", "data": vectors, "model": "emb", "usage": {}})
    service.engine = Engine.OLLAMA
    url = await serve(parts(service, model("emb:latest", capabilities=("embedding",))))
    body = {"model": "emb", "input": ["a"], "encoding_format": "base64", "dimensions": dimensions}
    status, answer, _ = await post(http, f"{url}/v1/embeddings", body)
    raw = base64.b64decode(answer["data"][0]["embedding"])
    vector = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert status == 200 and vector == pytest.approx([0.6, 0.8, 0.0][: dimensions or 3])
    # A vector already in base64 is unchanged.
    vectors[0]["embedding"] = "AAAAAA=="
    _, answer, _ = await post(http, f"{url}/v1/embeddings", {**body, "dimensions": None})
    assert answer["data"][0]["embedding"] == "AAAAAA=="
