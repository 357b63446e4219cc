"""The Ollama stand-in behaves as observed of a real Ollama."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.ollama_standin import Known, Standin
from tests.ollama_standin.engine import printed

EMBEDS = ("embedding",)


@pytest.fixture
async def standin() -> AsyncIterator[Standin]:
    named = Known("told:latest", blob="base:7b", messages=(("user", "one two"), ("assistant", "three")))
    async with Standin([Known("base:7b"), named, Known("emb:latest", capabilities=EMBEDS)]) as server:
        yield server


async def send(
    standin: Standin, path: str, body: Any = None, method: str = "POST"
) -> tuple[int, str, aiohttp.ClientResponse]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
    async with aiohttp.ClientSession() as http, http.request(method, standin.url + path, data=data) as reply:
        return reply.status, await reply.text(), reply


def error_of(text: str) -> Any:
    return json.loads(text)["error"]


CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False}


async def test_names_of_the_same_blob_share_a_runner_but_not_their_layers(standin: Standin) -> None:
    counts = []
    for name in ("base:7b", "told"):
        _, text, _ = await send(standin, "/api/chat", {"model": name, **CHAT})
        counts.append(json.loads(text)["prompt_eval_count"])
    assert counts[1] == counts[0] + 3
    assert standin.loads == 1
    _, text, _ = await send(standin, "/api/ps", method="GET")
    assert [entry["name"] for entry in json.loads(text)["models"]] == ["base:7b"], (
        "listed under the name that loaded it"
    )


async def test_a_created_model_shares_the_weights_and_has_its_own_layers(standin: Standin) -> None:
    made = {"model": "mine", "from": "told", "system": "Be kind.", "parameters": {"temperature": 0.1}}
    _, text, _ = await send(standin, "/api/create", made)
    assert [json.loads(line)["status"] for line in text.splitlines()][-1] == "success" and "layer" in text
    for path in ("/api/create", "/api/push"):
        _, text, _ = await send(standin, path, {**made, "stream": False})
        assert json.loads(text) == {"status": "success"}
    mine = standin.models["mine:latest"]
    assert (mine.weights, mine.system, mine.parent) == ("base:7b", "Be kind.", "told:latest")
    assert mine.messages == standin.models["told:latest"].messages


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_repetitive_answer_is_cut_off_without_a_final_chunk(standin: Standin, path: str) -> None:
    standin.models["base:7b"].text = "round " * 100
    status, text, _ = await send(standin, path, {"model": "base:7b", **CHAT, "stream": True})
    assert status == 200
    assert text.count("round") == 30
    assert '"done":true' not in text and "[DONE]" not in text and '"finish_reason":"' not in text


async def test_zero_and_negative_num_predict_mean_no_limit(standin: Standin) -> None:
    for limit in (0, -1):
        body = {"model": "base:7b", **CHAT, "options": {"num_predict": limit}}
        _, text, _ = await send(standin, "/api/chat", body)
        assert json.loads(text)["eval_count"] > 10


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/chat", {"model": "x", **CHAT}, 404, "model 'x' not found"),
        ("/api/chat", CHAT, 400, "model is required"),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", {"model": "emb", **CHAT}, 400, '"emb" does not support chat'),
        ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
        ("/api/show", {"model": "X:y"}, 404, "model 'X:y' not found"),
        ("/api/embed", {"model": "x", "input": "a"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/pull", {"model": "a b"}, 400, "invalid model name"),
        ("/api/create", {"model": ""}, 400, "invalid model name"),
        ("/api/copy", {"source": "base:7b", "destination": "/"}, 400, "invalid model name"),
        ("/api/chat", {"model": "base:7b", **CHAT, "keep_alive": "60"}, 400, 'invalid duration "60"'),
        ("/api/chat", {"model": "base:7b", **CHAT, "keep_alive": ""}, 400, 'invalid duration ""'),
    ],
)
async def test_errors_are_those_of_ollama(
    standin: Standin, path: str, body: Any, status: int, error: str
) -> None:
    received, text, _ = await send(standin, path, body)
    assert (received, error in error_of(text)) == (status, True), text


async def test_further_endpoints_and_statuses(standin: Standin) -> None:
    assert (await send(standin, "/api/copy", {"source": "base:7b", "destination": "base:7b"}))[0] == 200
    blob = b"GGUF"
    path = f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"
    assert [(await send(standin, path, blob))[0] for _ in range(2)] == [201, 200]
    assert (await send(standin, "/api/ps", method="HEAD"))[0] == 405
    assert (await send(standin, "/api/tags", method="HEAD"))[0] == 200
    assert (await send(standin, "/api/embed", {"model": "emb", "input": None}))[0] == 200
    assert (await send(standin, "/api/me"))[0] == 401
    _, _, answer = await send(standin, "/v1/models/base:7b", method="GET")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    _, text, _ = await send(standin, "/api/generate", {"model": "base:7b"})
    assert json.loads(text)["done_reason"] == "load", "a single object, not NDJSON"


def test_a_template_is_rendered_once_per_exchange() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = "[{{ .System }}|{{ .Prompt }}]{{ .Response }}</s>"
    shown = printed(template, [{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "c"}])
    assert shown == "[S|a]b</s>[|c]"


LONG = [{"role": "system", "content": "s"}, *({"role": "user", "content": "one two"} for _ in range(9))]


async def test_num_ctx_limits_the_context_exactly(standin: Standin) -> None:
    """A longer conversation is truncated or refused. Without ``num_ctx`` the model's parameter applies."""

    async def prompt(name: str, path: str = "/api/chat", **more: Any) -> tuple[int, Any]:
        body = {"model": name, "messages": LONG, "stream": False, **more}
        status, text, _ = await send(standin, path, body)
        return status, json.loads(text)

    _, full = await prompt("base:7b")
    status, truncated = await prompt("base:7b", options={"num_ctx": 9})
    assert status == 200 and truncated["prompt_eval_count"] < full["prompt_eval_count"]
    status, refused = await prompt("base:7b", options={"num_ctx": 9}, truncate=False)
    assert status == 400
    assert "exceeds the available context size (9 tokens)" in json.loads(refused["error"])["error"]["message"]
    standin.models["base:7b"].params = {"num_ctx": 9}
    assert (await prompt("base:7b"))[1]["prompt_eval_count"] == truncated["prompt_eval_count"]
    _, v1 = await prompt("base:7b", "/v1/chat/completions")
    assert v1["usage"]["prompt_tokens"] == truncated["prompt_eval_count"]
    _, text, _ = await send(standin, "/api/ps", method="GET")
    assert [entry["context_length"] for entry in json.loads(text)["models"]] == [9]


@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        ({"options": {"num_ctx": "512"}}, 500, 'option "num_ctx" must be of type integer'),
        ({"options": {"temperature": "0.1"}}, 500, 'option "temperature" must be of type float32'),
        ({"options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
        ({"options": {"num_predict": 2.0, "stop": ["x"], "top_k": None}}, 200, ""),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            400,
            "json:",
        ),
    ],
)
async def test_request_types_are_checked_as_in_go(
    standin: Standin, more: dict[str, Any], status: int, reason: str
) -> None:
    received, text, _ = await send(standin, "/api/chat", {"model": "base:7b", **CHAT, **more})
    assert received == status and (not reason or reason in error_of(text))


PROPERTIES = {"type": "object", "properties": {"a": {"type": "string"}}}


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get", **parameters}}


@pytest.mark.parametrize(
    ("path", "more", "status", "reason"),
    [
        ("/api/chat", {"tools": [tool()]}, 400, "properties must be an object"),
        ("/api/chat", {"tools": [tool(parameters={"type": "object"})]}, 400, "properties must be an object"),
        ("/api/chat", {"tools": [tool(parameters=PROPERTIES)]}, 200, ""),
        ("/api/chat", {"think": "huge"}, 400, 'invalid think value: "huge" (must be "high", "medium"'),
        ("/api/chat", {"format": "yaml"}, 500, 'invalid format: "\\"yaml\\""; expected "json"'),
        ("/api/chat", {"logprobs": True, "top_logprobs": 21}, 400, "between 0 and 20"),
        ("/api/generate", {"prompt": "a", "raw": True, "system": "s"}, 400, "raw mode does not support"),
        ("/api/generate", {"prompt": "a", "images": ["%%"]}, 400, "illegal base64 data at input byte 0"),
        ("/api/generate", {"prompt": "a", "images": ["aGk="]}, 400, "does not support multimodal requests"),
        ("/v1/chat/completions", {"messages": []}, 400, "[] is too short"),
        ("/v1/chat/completions", {"tools": [tool()]}, 400, "properties must be an object"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "cannot unmarshal array"),
    ],
)
async def test_invalid_requests_are_refused(
    standin: Standin, path: str, more: dict[str, Any], status: int, reason: str
) -> None:
    received, text, _ = await send(standin, path, {"model": "base:7b", **CHAT, **more})
    assert received == status, text
    if reason:
        error = error_of(text)
        assert reason in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("texts", [5, [5], ["a", ""]])
async def test_invalid_embedding_inputs_are_refused(standin: Standin, texts: Any) -> None:
    assert (await send(standin, "/api/embed", {"model": "emb", "input": texts}))[0] == 400
