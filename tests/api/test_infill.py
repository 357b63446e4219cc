"""Infill (a suffix) in every dialect, with a real llama-server whose model has FIM tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.chunks import read_infilled
from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.serving.request import Call, Engine
from tests.api.api_parts import PlainLibrary, ScriptedService, chunk, model, parts
from tests.api.conftest import Serve
from tests.api.direct_service import DirectService, LlamaServer
from tests.gguf.writer import write

FILL = model("fill:latest", capabilities=("completion", "insert"))


@pytest.fixture(scope="module")
def infill_server(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    fim_tokens = {
        f"tokenizer.ggml.fim_{name}_token_id": 20 + n for n, name in enumerate(("pre", "suf", "mid"))
    }
    file = write(tmp_path_factory.mktemp("fill") / "fill.gguf", more=dict(fim_tokens))
    with LlamaServer(llama.server, file, context=512) as server:
        yield server.url


@pytest.fixture
async def url(infill_server: str, serve: Serve) -> str:
    return await serve(parts(DirectService({FILL.name: infill_server}), library=PlainLibrary(FILL, model())))


async def events(http: ClientSession, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        payloads = [line.removeprefix("data: ") for line in (await answer.text()).splitlines()]
    return [json.loads(line) for line in payloads if line.startswith("{")]


def test_an_unreadable_event_is_an_engine_error() -> None:
    for raw in (b"{", b'{"content":1}', b'{"error":{"message":"boom"}}'):
        with pytest.raises(Refusal) as refused:
            read_infilled(raw)
        assert refused.value.fault is Fault.ENGINE


@pytest.mark.llama
async def test_completions_with_a_suffix(url: str, http: ClientSession) -> None:
    body = {"model": "fill", "prompt": "one ", "suffix": " three", "max_tokens": 6, "temperature": 0}
    body |= {"logprobs": 2}
    (whole,) = await events(http, f"{url}/v1/completions", body)
    choice = whole["choices"][0]
    assert (choice["finish_reason"], whole["object"]) == ("length", "text_completion")
    assert choice["text"] and len(choice["logprobs"]["content"]) == 6
    assert whole["usage"]["completion_tokens"] == 6 and whole["usage"]["prompt_tokens"] > 3
    streamed_events = await events(
        http, f"{url}/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert "".join(c["text"] for event in streamed_events for c in event["choices"]) == choice["text"]
    assert (
        streamed_events[-1]["usage"] == whole["usage"]
        and streamed_events[-2]["choices"][0]["finish_reason"] == "length"
    )
    assert len({event["id"] for event in streamed_events}) == 1
    without_usage = await events(http, f"{url}/v1/completions", {**body, "stream": True})
    assert all(event["choices"] for event in without_usage)


@pytest.mark.llama
async def test_generate_with_a_suffix_and_logprobs(url: str, http: ClientSession) -> None:
    body = {"model": "fill", "prompt": "one ", "suffix": " three", "logprobs": True, "top_logprobs": 2}
    body |= {"options": {"num_predict": 6, "temperature": 0}}
    (whole,) = await events(http, f"{url}/api/generate", {**body, "stream": False})
    assert whole["done_reason"] == "length" and len(whole["logprobs"]) == 6
    assert len(whole["logprobs"][0]["top_logprobs"]) == 2
    streamed_events = await events(http, f"{url}/api/generate", body)
    assert "".join(event["response"] for event in streamed_events) == whole["response"]
    assert sum(len(event.get("logprobs", [])) for event in streamed_events) == 6


async def test_a_suffix_is_refused_for_a_model_without_infill(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(), library=PlainLibrary(model(), FILL)))
    body = {"model": "demo", "prompt": "a", "suffix": "b"}
    async with http.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 400 and "does not support a suffix" in await answer.text()
    for wrong in ({"prompt": ["a", "b"]}, {"n": 2}):
        async with http.post(f"{url}/v1/completions", json={**body, "model": "fill", **wrong}) as answer:
            assert answer.status == 400 and "suffix" in await answer.text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alternatives", [0, 1])
async def test_logprobs_beside_a_suffix_are_openais_columns(
    serve: Serve, http: ClientSession, alternatives: int, stream: bool
) -> None:
    row = {"token": "tw", "logprob": -0.5, "bytes": [], "top_logprobs": [{"token": "a", "logprob": -1.5}]}
    event = {
        "content": "two",
        "stop": True,
        "stop_type": "eos",
        "completion_probabilities": [row, {**row, "token": "o"}],
    }
    service = ScriptedService(event)
    url = await serve(parts(service, library=PlainLibrary(FILL)))
    body = {"model": "fill", "prompt": "one", "suffix": "three", "logprobs": alternatives, "stream": stream}
    (answer,) = await events(http, f"{url}/v1/completions", body)
    assert service.asks[-1].calls[Engine.LLAMA].body["n_probs"] == 1
    logprobs = answer["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"]) == (["tw", "o"], [-0.5, -0.5])
    assert logprobs["text_offset"] == [0, 2]
    assert logprobs["top_logprobs"] == ([{"a": -1.5}] * 2 if alternatives else None)


async def test_ollamas_answer_to_a_suffix_is_passed_on(serve: Serve, http: ClientSession) -> None:
    event = {**chunk(), "choices": [{"index": 0, "text": "two", "finish_reason": "stop"}]}
    # The model has the requested name; a whole answer has the fields that OpenAI's schema requires.
    streamed = {**event, "model": "fill"}
    whole = {**streamed, "choices": [{**event["choices"][0], "logprobs": None}]}
    service = ScriptedService(event, engine=Engine.OLLAMA)
    url = await serve(parts(service, library=PlainLibrary(FILL)))
    body = {"model": "fill", "prompt": "one", "suffix": "three"}
    for stream in (False, True):
        assert await events(http, f"{url}/v1/completions", {**body, "stream": stream}) == [
            streamed if stream else whole
        ]
    calls = service.asks[-1].calls
    assert calls[Engine.OLLAMA] == Call("/v1/completions", {**body, "stream": True})
    assert calls[Engine.LLAMA].path == "/infill" and calls[Engine.LLAMA].body["input_suffix"] == "three"
