"""Numbers out of range are refused in every dialect with the field's name; valid ones reach the engine."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import (
    BODIES,
    call_of,
    model,
    parts,
    text_service,
)
from tests.api.conftest import Serve
from tests.api.dialects import error_of, post

LIMITS = {
    "/api/chat": "num_predict",
    "/api/generate": "num_predict",
    "/v1/responses": "max_output_tokens",
}
WRONG: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 1e9, "nan", "inf", True, [1], 1e300),
    "top_p": (-0.1, 1.1, "nan", True),
}
SAMPLED = {
    "presence_penalty": (-2.1, 3, True),
    "frequency_penalty": (-9, 2.5, "nan"),
    "min_p": (-0.1, 2),
    "typical_p": (-1, 5),
    "repeat_penalty": (0, -1, "nan", 1e9),
    "top_k": (2**31, -(2**70), True),
    "seed": (2**63, -(2**64), True),
    "mirostat": (3, -1),
    "mirostat_tau": (-1, "inf"),
}
COUNTED = {"n": (0, -1, 10**9, True, 1.5), "max_tokens": (-2, 2**63, True, 1.5)}


def request_body(path: str, **named: Any) -> dict[str, Any]:
    body = {**BODIES[path], "stream": True}
    return {**body, "options": named} if path.startswith("/api/") else {**body, **named}


def invalid_values(path: str) -> dict[str, tuple[Any, ...]]:
    values = dict(WRONG)
    if path not in ("/v1/responses", "/v1/messages"):
        values |= SAMPLED
    if path in ("/v1/chat/completions", "/v1/completions"):
        values |= COUNTED
    if path == "/v1/messages":
        values |= {"max_tokens": (0, -1, 2**63, True), "top_k": (2**31, True)}
    if path == "/v1/responses":
        values |= {"max_output_tokens": (0, -1, 2**63, True), "top_logprobs": (-1, 21, True)}
    if path == "/v1/chat/completions":
        values |= {"max_completion_tokens": (0, -2), "top_logprobs": (-1, 21)}
    return values


@pytest.mark.parametrize("path", BODIES)
async def test_numbers_out_of_range_are_refused_by_name(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    for name, values in invalid_values(path).items():
        for value in values:
            body = request_body(
                path, **{name: value, **({"logprobs": True} if name == "top_logprobs" else {})}
            )
            status, answer, _ = await post(http, url + path, body)
            assert status == 400, (name, value, answer)
            assert name in error_of(path, answer), (name, value, answer)
            if path.startswith("/v1") and path != "/v1/messages":
                assert answer["error"]["param"] == name
    assert not service.asks


@pytest.mark.parametrize("path", BODIES)
async def test_numbers_at_the_bounds_reach_the_engine(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    limit = LIMITS.get(path, "max_tokens")
    for named in ({"temperature": 0, "top_p": 1, limit: 1}, {"temperature": 2.5, "top_p": 0, limit: 10**12}):
        async with http.post(url + path, json=request_body(path, **named)) as answer:
            assert answer.status == 200, await answer.text()
        sent = call_of(service).body
        assert (sent["temperature"], sent["top_p"]) == (named["temperature"], named["top_p"])
        assert sent.get("max_tokens", sent.get("n_predict")) == min(named[limit], 2**31 - 1)


@pytest.mark.parametrize("path", [path for path in BODIES if path.endswith(("chat", "completions"))])
async def test_seeds_are_reduced_to_32_bits(serve: Serve, http: ClientSession, path: str) -> None:
    """llama-server would read more than 64 bits as a float, and use the same seed for all of them."""
    service = text_service()
    url = await serve(parts(service))
    for seed, read in ((7, 7), (2**40 + 5, 5), (2**63 - 1, 2**32 - 1)):
        async with http.post(url + path, json=request_body(path, seed=seed)) as answer:
            assert answer.status == 200
        assert call_of(service).body["seed"] == read


async def test_a_limit_of_minus_one_is_passed_on(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    for path in ("/v1/chat/completions", "/v1/completions"):
        async with http.post(url + path, json=request_body(path, max_tokens=-1)) as answer:
            assert answer.status == 200
        assert call_of(service).body["max_tokens"] == -1


@pytest.mark.parametrize("limit", ["max_tokens", "n_predict"])
async def test_ollama_is_not_asked_for_zero_tokens(serve: Serve, http: ClientSession, limit: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    body = request_body("/v1/completions", **{limit: 0})
    async with http.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
    assert service.asks[-1].calls.keys() == {Engine.LLAMA}


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_invalid_parameters_of_a_modelfile_are_ignored(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = text_service()
    params = '{"temperature":-1,"top_p":"much","top_k":7,"stop":["x"],"num_predict":true}'
    url = await serve(parts(service, model(params=params)))
    async with http.post(url + path, json=request_body(path, seed=1)) as answer:
        assert answer.status == 200, await answer.text()
    sent = call_of(service).body
    assert (sent["top_k"], sent["stop"], sent["seed"]) == (7, ["x"], 1)
    assert not sent.keys() & {"temperature", "top_p", "n_predict"}
