"""``/v1/completions`` sends the raw prompt, without the model's template, to both engines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.cluster.gossip.record import Backend
from sollold.serving.request import Call, Engine
from tests.api.api_parts import PlainLibrary, ScriptedService, model, parts
from tests.api.conftest import Serve
from tests.doubles import until
from tests.serving.cluster_double import Cluster
from tests.serving.reciter import TEXT

NAMES = {"model": "demo", "created_at": "2026-01-01T00:00:00Z"}
LAST = {"done": True, "done_reason": "length", "prompt_eval_count": 3, "eval_count": 2}


def record(text: str, **more: Any) -> bytes:
    return json.dumps({**NAMES, "response": text, "done": False, **more}).encode()


async def post(http: ClientSession, url: str, **body: Any) -> tuple[int, str]:
    async with http.post(f"{url}/v1/completions", json={"model": "demo", **body}) as answer:
        return answer.status, await answer.text()


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_ollama_gets_a_raw_prompt_and_its_own_field_names(http: ClientSession, serve: Serve) -> None:
    service = ScriptedService(record("", **LAST), engine=Engine.OLLAMA)
    url = await serve(parts(service, model()))
    await post(
        http,
        url,
        prompt=["Once"],
        max_tokens=5,
        temperature=0.5,
        seed=7,
        stop=["x"],
        top_k=3,
        keep_alive="1m",
        logit_bias={},
        response_format={"type": "json_object"},
    )
    assert service.asks[0].calls[Engine.OLLAMA] == Call(
        "/api/generate",
        {
            "model": "demo",
            "prompt": "Once",
            "raw": True,
            "stream": False,
            "options": {"num_predict": 5, "temperature": 0.5, "seed": 7, "stop": ["x"], "top_k": 3},
            "keep_alive": "1m",
            "format": "json",
        },
    )
    assert service.asks[0].calls[Engine.LLAMA].path == "/v1/completions"


async def test_ollama_separates_no_thinking_from_a_raw_answer(http: ClientSession, serve: Serve) -> None:
    """Its parser of thinking is on by default; the text of a completion is all that the model writes."""
    for capabilities, think in (("completion", "thinking"), False), (("completion",), None):
        service = ScriptedService(record("", **LAST), engine=Engine.OLLAMA)
        url = await serve(parts(service, model(capabilities=capabilities)))
        await post(http, url, prompt="Once <think>")
        assert service.asks[0].calls[Engine.OLLAMA].body.get("think") is think


async def test_ollamas_lines_become_chunks(http: ClientSession, serve: Serve) -> None:
    service = ScriptedService(record("one "), record("two"), record("", **LAST), engine=Engine.OLLAMA)
    url = await serve(parts(service, model()))
    _, text = await post(http, url, prompt="Count", stream=True, stream_options={"include_usage": True})
    *answer, usage = chunks(text)
    assert [part["choices"][0]["text"] for part in answer] == ["one ", "two", ""]
    assert [part["choices"][0]["finish_reason"] for part in answer] == [None, None, "length"]
    assert {part["object"] for part in answer} == {"text_completion"}
    assert len({part["id"] for part in answer}) == 1 and answer[0]["model"] == "demo"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize("counted", [True, False])
async def test_llama_servers_usage_is_sent_in_a_separate_chunk(
    http: ClientSession, serve: Serve, counted: bool
) -> None:
    """llama-server always sends usage in the last chunk with text, where OpenAI's clients don't expect it."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = {"choices": [{"index": 0, "text": "two", "finish_reason": "stop"}], "id": "c", "timings": {"n": 2}}
    first = {"choices": [{"index": 0, "text": "one ", "finish_reason": None}], "id": "c"}
    events = [json.dumps(event).encode() for event in (first, {**last, "usage": usage})]
    url = await serve(parts(ScriptedService(*events, engine=Engine.LLAMA), model()))
    options = {"stream_options": {"include_usage": True}} if counted else {}
    _, text = await post(http, url, prompt="Count", stream=True, **options)
    *answer, last_event = chunks(text) if counted else (*chunks(text), {})
    assert answer == [first, last]
    if counted:
        assert last_event["choices"] == [] and usage.items() <= last_event["usage"].items()


async def test_a_whole_answer_has_openais_form(http: ClientSession, serve: Serve) -> None:
    service = ScriptedService(record("one two", **LAST), engine=Engine.OLLAMA)
    url = await serve(parts(service, model()))
    _, text = await post(http, url, prompt="Count")
    answer = json.loads(text)
    assert answer["choices"] == [{"index": 0, "text": "one two", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["total_tokens"] == 5 and answer["object"] == "text_completion"


def row(token: str, logprob: float, *alternatives: str) -> dict[str, Any]:
    top_logprobs = [{"token": rival, "logprob": -9.0} for rival in alternatives]
    return {"token": token, "logprob": logprob, "top_logprobs": top_logprobs}


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("top_count", [0, 1])
async def test_logprobs_have_the_legacy_column_format(
    http: ClientSession, serve: Serve, engine: Engine, top_count: int
) -> None:
    pieces = [[row("one ", -1.0, "a", "b")], [row("two", -2.0, "c")]]
    events = [record(rows[0]["token"], logprobs=rows) for rows in pieces] + [record("", **LAST)]
    if engine is Engine.LLAMA:
        choices = [{"index": 0, "text": rows[0]["token"], "logprobs": {"content": rows}} for rows in pieces]
        events = [json.dumps({"choices": [choice]}).encode() for choice in choices]
    service = ScriptedService(*events, engine=engine)
    url = await serve(parts(service, model()))
    _, text = await post(http, url, prompt="Count", stream=True, logprobs=top_count)
    first, second = (part["choices"][0]["logprobs"] for part in chunks(text)[:2])
    assert (first["tokens"], first["token_logprobs"], first["text_offset"]) == (["one "], [-1.0], [0])
    assert (second["tokens"], second["text_offset"]) == (["two"], [4])
    assert first["top_logprobs"] == ([{"a": -9.0}] if top_count else None)
    assert first["content"][0]["token"] == "one "
    assert service.asks[0].calls[Engine.LLAMA].body["logprobs"] == 1
    assert service.asks[0].calls[Engine.OLLAMA].body["logprobs"] is True


@pytest.mark.parametrize(
    "body", [{"prompt": [1, 2, 3]}, {"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}, {"prompt": [["a"], "b"]}]
)
async def test_prompts_that_ollama_does_not_support_go_only_to_llama_server(
    http: ClientSession, serve: Serve, body: dict[str, Any]
) -> None:
    service = ScriptedService(b'{"choices":[]}')
    stored = model("stored:latest", only_ollama="llama.cpp can't load it")
    url = await serve(parts(service, library=PlainLibrary(model(), stored)))
    assert (await post(http, url, **body))[0] == 200
    assert set(service.asks[0].calls) == {Engine.LLAMA}
    status, text = await post(http, url, **{**body, "model": "stored"})
    assert status == 400 and "needs llama.cpp. llama.cpp can't" in text


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    started = Cluster()
    yield started
    await started.stop()


async def test_a_completion_continues_on_another_ollama_after_a_crash(
    cluster: Cluster, http: ClientSession, serve: Serve
) -> None:
    a, b, c = [await cluster.node(name) for name in "abc"]
    first_reciter, second_reciter = await cluster.reciter(), await cluster.reciter()
    b.engines.serve("ollama:m", first_reciter, slots=8, backend=Backend.OLLAMA)
    c.engines.serve("ollama:n", second_reciter, slots=1, backend=Backend.OLLAMA, active=1)
    first_reciter.die_after = 50
    url = await serve(parts(a.serving, model("reciter:latest")))
    _, text = await post(http, url, model="reciter", prompt="Say: ", stream=True)
    assert "".join(part["choices"][0]["text"] for part in chunks(text)) == TEXT
    assert first_reciter.requests and second_reciter.requests, "both got a request"
    await until(lambda: all(node.server.under_way == 0 for node in cluster.nodes))


async def test_the_initial_null_of_answers_to_several_prompts_is_dropped(
    http: ClientSession, serve: Serve
) -> None:
    """llama-server sends it, but clients that parse each event as a chunk would fail."""
    event = {"choices": [{"index": 1, "text": "a", "finish_reason": None}], "object": "text_completion"}
    url = await serve(parts(ScriptedService(b"null", event), model()))
    status, text = await post(http, url, prompt=["Once", "Twice"], stream=True)
    assert status == 200 and [part["choices"][0]["text"] for part in chunks(text)] == ["a"]
