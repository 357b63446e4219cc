"""Values of a wrong type: converted if the meaning is clear, otherwise refused with the field's name."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from tests.api.api_parts import CHAT, ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import post

TEXT = {"model": "demo", "prompt": "a", "stream": True}
ROUTES = {"/v1/chat/completions": {**CHAT, "stream": True}, "/v1/completions": TEXT}


@pytest.mark.parametrize("path", ROUTES)
async def test_numbers_of_the_engines_own_fields_are_converted(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """llama-server ignores numbers in quotes."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    fields = {"top_k": "5", "min_p": "0.1", "repeat_penalty": "1.5", "mirostat": 2.0, "cache_prompt": "false"}
    async with http.post(url + path, json={**ROUTES[path], **fields}) as answer:
        assert answer.status == 200, await answer.read()
    sent = call_of(service).body
    assert [sent[name] for name in fields] == [5, 0.1, 1.5, 2, False]
    assert type(sent["mirostat"]) is int and type(sent["cache_prompt"]) is bool
    for name in fields:
        status, refusal, _ = await post(http, url + path, {**ROUTES[path], name: "many"})
        assert (status, refusal["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": "many"}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "stop": [1]}, "stop[0]"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, "n"),
        ("/v1/chat/completions", {**CHAT, "temperature": -1}, "temperature"),
        ("/v1/chat/completions", {"model": "demo", "messages": []}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{}] * 5000}, "messages"),
        ("/v1/completions", {"model": "demo"}, "prompt"),
        ("/v1/responses", {"model": "demo", "input": ""}, "input"),
        ("/v1/responses", {"model": "demo", "input": "a", "store": 5}, "store"),
        (
            "/v1/responses",
            {"model": "demo", "input": "a", "previous_response_id": "x"},
            "previous_response_id",
        ),
        ("/v1/embeddings", {"model": "words", "input": "a", "dimensions": 0}, "dimensions"),
        ("/infill", {"model": "demo", "input_prefix": "a", "input_suffix": "b", "top_k": "x"}, "top_k"),
        ("/v1/chat/completions", {**CHAT, "model": "  "}, "model"),
    ],
)
async def test_errors_have_the_invalid_field_as_param(
    serve: Serve, http: ClientSession, path: str, body: dict[str, Any], field: str
) -> None:
    url = await serve(parts(ScriptedService(), model(), model("words:latest", capabilities=("embedding",))))
    status, answer, _ = await post(http, url + path, body)
    assert (status, answer["error"]["param"]) == (400, field), answer
    assert answer["error"]["type"] == "invalid_request_error"


ENGINE_FIELDS: dict[str, Any] = {
    "samplers": ["top_k", "temperature"],
    "logit_bias": {"5": -1.5, "7": False},
    "dry_sequence_breakers": ["x"],
    "post_sampling_probs": True,
    "grammar": 'root ::= "a"',
    "json_schema": {"type": "object"},
    "response_fields": ["content"],
    "timings_per_token": True,
    "t_max_predict_ms": 500,
}
CHAT_FIELDS: dict[str, Any] = {
    "chat_template_kwargs": {"a": 1},
    "reasoning_format": "none",
    "add_generation_prompt": True,
    "reasoning_budget_tokens": 5,
}


@pytest.mark.parametrize("path", ROUTES)
async def test_wrong_types_in_the_engines_own_fields_are_refused(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """llama-server ignores other types, or its error doesn't name the field."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    for name, value in {**ENGINE_FIELDS, **(CHAT_FIELDS if "chat" in path else {})}.items():
        async with http.post(url + path, json={**ROUTES[path], name: value}) as answer:
            assert answer.status == 200, await answer.read()
        assert call_of(service).body[name] == value
        wrong: Any
        for wrong in (5.5, "x", [[1]], {"a": []}, True):
            if isinstance(wrong, type(value)) and wrong != {"a": []}:
                continue
            if name in ("json_schema", "chat_template_kwargs") and isinstance(wrong, bool | dict):
                continue
            if (name, wrong) in (("samplers", "x"), ("logit_bias", [[1]])):
                continue
            status, refusal, _ = await post(http, url + path, {**ROUTES[path], name: wrong})
            assert status == 400 and refusal["error"]["param"].startswith(name), (name, wrong)
