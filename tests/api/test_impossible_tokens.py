"""The logprob of an impossible token is -9999, as in OpenAI's API, in each dialect, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import post

LOWEST = -3.4028234663852886e38
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROW = {
    "id": 1,
    "token": "a",
    "bytes": [97],
    "logprob": LOWEST,
    "top_logprobs": [
        {"id": 2, "token": "b", "bytes": [98], "logprob": -1.5e-05},
        {"id": 1, "token": "a", "bytes": [97], "logprob": LOWEST},
    ],
}
TEXT = '"logprob":-3.4028234663852886e+38'
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, **LOGPROBS},
    "/v1/completions": {"prompt": "hi", "logprobs": 2},
    "/v1/responses": {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "/api/chat": {**CHAT, **LOGPROBS},
    "/api/generate": {"prompt": "hi", **LOGPROBS},
}


def scripted(path: str, stream: bool) -> ScriptedService:
    if path == "/v1/completions":
        choice: dict[str, Any] = {"text": TEXT, "logprobs": {"content": [ROW]}, "index": 0}
        whole = {"choices": [{**choice, "finish_reason": "stop"}], "usage": {}}
        streamed = {"choices": [{**choice, "finish_reason": None}]}
    else:
        streamed = chunk(TEXT)
        streamed["choices"][0]["logprobs"] = {"content": [ROW]}
        message = {"role": "assistant", "content": TEXT}
        choice = {"index": 0, "message": message, "logprobs": {"content": [ROW]}, "finish_reason": "stop"}
        whole = {"choices": [choice], "usage": {}}
    if not stream and path != "/v1/responses":
        return ScriptedService(whole)
    return ScriptedService(streamed, chunk(finish="stop"), usage_chunk())


def logprobs_in(value: Any, key: str = "") -> list[float]:
    """All logprobs in an answer."""
    if isinstance(value, dict):
        columns = value.get("token_logprobs") or []
        top_values = (
            [logprob for alternatives in value.get("top_logprobs") or () for logprob in alternatives.values()]
            if columns
            else []
        )
        inner = [logprob for name, member in value.items() for logprob in logprobs_in(member, name)]
        return [*inner, *columns, *top_values]
    if isinstance(value, list):
        return [logprob for item in value for logprob in logprobs_in(item)]
    return [value] if key == "logprob" else []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", REQUESTS)
async def test_llama_cpps_lowest_logprob_is_replaced(
    serve: Serve, http: ClientSession, path: str, stream: bool
) -> None:
    url = await serve(parts(scripted(path, stream)))
    async with http.post(
        f"{url}{path}", json={"model": "demo", "stream": stream, **REQUESTS[path]}
    ) as answer:
        assert answer.status == 200
        text = await answer.text()
    lines = [line.removeprefix("data: ") for line in text.splitlines() if "{" in line]
    events = [json.loads(line) for line in lines]
    numbers = logprobs_in(events)
    assert set(numbers) == {-9999.0, -1.5e-05} and len(numbers) >= 3
    # The model's text is unchanged.
    assert json.dumps(TEXT)[1:-1] in text


async def test_ollamas_lowest_logprob_is_replaced_in_a_completion(serve: Serve, http: ClientSession) -> None:
    record = {"model": "demo", "response": "a", "done": True, "done_reason": "stop", "logprobs": [ROW]}
    service = ScriptedService(record, engine=Engine.OLLAMA)
    url = await serve(parts(service, model(only_ollama="Its files can't be read.")))
    body = {"model": "demo", "prompt": "hi", "logprobs": 2}
    status, answer, _ = await post(http, f"{url}/v1/completions", body)
    assert status == 200 and set(logprobs_in(answer)) == {-9999.0, -1.5e-05}


@pytest.mark.llama
async def test_a_forbidden_token_of_llama_cpp_has_the_documented_logprob(
    real: str, http: ClientSession
) -> None:
    body = {"model": "demo", "prompt": "hi", "max_tokens": 1, "logprobs": 1, "temperature": 0}
    _, answer, _ = await post(http, f"{real}/v1/completions", body)
    (forbidden,) = answer["choices"][0]["logprobs"]["tokens"]
    _, ids, _ = await post(http, f"{real}/tokenize", {"model": "demo", "content": forbidden})
    body |= {"logit_bias": {str(ids["tokens"][-1]): False}, "logprobs": 20}
    _, answer, _ = await post(http, f"{real}/v1/completions", body)
    assert min(logprobs_in(answer)) >= -9999.0
