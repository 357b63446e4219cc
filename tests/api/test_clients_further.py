"""Less common features through the official clients, streamed and not where a dialect has both."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import ollama
import openai
import pytest

from sollold.models.gguf.demo_model import GREETING
from tests.api.callers import ASK, SCHEMA, chatgpt, claude
from tests.api.conftest import OLLAMAS, WAYS
from tests.api.reciters import CALL, CONCLUSION, THOUGHT, TOOL

pytestmark = [pytest.mark.llama, pytest.mark.clients, pytest.mark.timeout(90)]

LEVELS = ("low", "medium", "high")


def keys(text: str | None) -> set[str]:
    return set(json.loads(text or ""))


# --- structured output


async def test_ollama_schema_streamed(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    parts = [part async for part in await client.chat("random", ASK, format=SCHEMA, stream=True)]
    assert keys("".join(part.message.content or "" for part in parts)) == {"age", "tall"}
    written = await client.generate("random", "x", format=SCHEMA, stream=True)
    assert keys("".join([part.response or "" async for part in written])) == {"age", "tall"}


async def test_ollama_json(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    options: dict[str, Any] = {"format": "json", "options": {"num_predict": 24, "temperature": 0}}
    whole = await client.chat("random", ASK, **options)
    assert (whole.message.content or "").lstrip().startswith("{")
    parts = [part async for part in await client.chat("random", ASK, stream=True, **options)]
    assert "".join(part.message.content or "" for part in parts).lstrip().startswith("{")


async def test_openai_schema_streamed_and_json_object(url: str) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    plain: Any = {"type": "json_object"}
    async with chatgpt(url) as client:

        async def streamed(form: Any, **more: Any) -> str:
            stream = await client.chat.completions.create(
                model="random", messages=ASK, response_format=form, stream=True, **more
            )
            return "".join([part.choices[0].delta.content or "" async for part in stream if part.choices])

        assert keys(await streamed(shape)) == {"age", "tall"}
        options: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
        whole = await client.chat.completions.create(
            model="random", messages=ASK, response_format=plain, **options
        )
        assert (whole.choices[0].message.content or "").lstrip().startswith("{")
        assert (await streamed(plain, **options)).lstrip().startswith("{")


async def test_anthropic_schema(url: str) -> None:
    shape: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    request: dict[str, Any] = {"model": "random", "max_tokens": 200, "messages": ASK, "output_config": shape}
    async with claude(url) as client:
        whole = await client.messages.create(**request)
        assert whole.content[0].type == "text" and keys(whole.content[0].text) == {"age", "tall"}
        async with client.messages.stream(**request) as stream:
            text = "".join([piece async for piece in stream.text_stream])
        assert keys(text) == {"age", "tall"}


# --- logprobs


async def test_ollama_logprobs_streamed_and_of_a_text(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "options": {"num_predict": 2}}
    streamed = [part async for part in await client.chat("demo", ASK, stream=True, **options)]
    token_logprobs = [logprob for part in streamed for logprob in part.logprobs or ()]
    assert (
        GREETING.startswith("".join(logprob.token for logprob in token_logprobs)) and len(token_logprobs) == 2
    )
    assert (
        token_logprobs[0].top_logprobs and token_logprobs[0].top_logprobs[0].token == token_logprobs[0].token
    )
    text = await client.generate("demo", "Hi", **options)
    assert [logprob.token for logprob in text.logprobs or ()] == [logprob.token for logprob in token_logprobs]


async def test_openai_logprobs_streamed(url: str) -> None:
    async with chatgpt(url) as client:
        token_logprobs = []
        async for part in await client.chat.completions.create(
            model="demo", messages=ASK, max_tokens=2, logprobs=True, top_logprobs=2, stream=True
        ):
            for choice in part.choices:
                token_logprobs += (choice.logprobs.content or []) if choice.logprobs else []
        assert (
            GREETING.startswith("".join(logprob.token for logprob in token_logprobs))
            and len(token_logprobs) == 2
        )
        assert token_logprobs[0].top_logprobs[0].token == token_logprobs[0].token


# --- tools and thinking


async def test_openai_tool_choice_none(url: str) -> None:
    """Ollama has no ``tool_choice``, so it gets no tools."""
    async with chatgpt(url) as client:
        request: dict[str, Any] = {"model": "call", "messages": ASK, "tools": [TOOL], "tool_choice": "none"}
        whole = await client.chat.completions.create(**request)
        message = whole.choices[0].message
        assert not message.tool_calls and message.content == CALL and whole.choices[0].finish_reason == "stop"
        parts = [part async for part in await client.chat.completions.create(**request, stream=True)]
        deltas = [choice.delta for part in parts for choice in part.choices]
        assert not any(delta.tool_calls for delta in deltas)
        assert "".join(delta.content or "" for delta in deltas) == CALL


async def test_ollama_think_levels_reach_the_template(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    counts = {}
    for level in LEVELS:
        whole = await client.chat("think", ASK, think=level)
        assert (whole.message.thinking or "").strip() == THOUGHT and whole.message.content == CONCLUSION
        last = [part async for part in await client.chat("think", ASK, think=level, stream=True)][-1]
        assert last.prompt_eval_count == whole.prompt_eval_count
        counts[level] = whole.prompt_eval_count or 0
    # The template writes the level into the prompt, with one token per letter.
    assert [counts[level] - counts["low"] for level in LEVELS] == [len(level) - 3 for level in LEVELS]
    without_thinking = await client.chat("think", ASK, think=False)
    assert without_thinking.message.thinking is None and CONCLUSION in (
        without_thinking.message.content or ""
    )
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat("demo", ASK, think="high")
    assert refused.value.status_code == 400


async def test_openai_reasoning_effort_reaches_the_template(url: str) -> None:
    async with chatgpt(url) as client:
        counts, response_counts = [], []
        for level in LEVELS:
            effort: Any = level
            whole = await client.chat.completions.create(model="think", messages=ASK, reasoning_effort=effort)
            counts.append(whole.usage.prompt_tokens if whole.usage else 0)
            answer = await client.responses.create(model="think", input=ASK, reasoning={"effort": effort})
            response_counts.append(answer.usage.input_tokens if answer.usage else 0)
        differences = [len(level) - 3 for level in LEVELS]
        assert [count - counts[0] for count in counts] == differences
        assert [count - response_counts[0] for count in response_counts] == differences


# --- infill and tokens


async def test_ollama_suffix(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    options: dict[str, Any] = {"suffix": " three", "options": {"num_predict": 6, "temperature": 0}}
    whole = await client.generate("fill", "one ", **options)
    assert whole.response and whole.done_reason == "length" and whole.eval_count == 6
    parts = [part async for part in await client.generate("fill", "one ", stream=True, **options)]
    assert "".join(part.response or "" for part in parts) == whole.response
    with pytest.raises(ollama.ResponseError, match="does not support") as refused:
        await client.generate("demo", "one ", suffix=" three")
    assert refused.value.status_code == 400


async def test_openai_suffix(url: str) -> None:
    async with chatgpt(url) as client:
        request: dict[str, Any] = {"model": "fill", "prompt": "one ", "suffix": " three"}
        request |= {"max_tokens": 6, "temperature": 0}
        whole = await client.completions.create(**request)
        assert whole.choices[0].text and whole.choices[0].finish_reason == "length"
        text = ""
        async for part in await client.completions.create(**request, stream=True):
            text += part.choices[0].text if part.choices else ""
        assert text == whole.choices[0].text
        with pytest.raises(openai.BadRequestError, match="does not support"):
            await client.completions.create(model="demo", prompt="one ", suffix=" three")


async def test_openai_client_on_the_routes_of_llama_server(url: str, way: str) -> None:
    gap = {"model": "fill", "input_prefix": "one ", "input_suffix": " three", "n_predict": 4}
    async with chatgpt(url).with_options(base_url=url) as client:

        async def post(path: str, body: dict[str, Any]) -> Any:
            return await client.post(path, body=body, cast_to=object)

        if way == OLLAMAS:
            for path, body in (("/tokenize", {"model": "demo", "content": "Hello!"}), ("/infill", gap)):
                with pytest.raises(openai.BadRequestError, match=r"llama\.cpp"):
                    await post(path, body)
            return
        tokens = (await post("/tokenize", {"model": "demo", "content": "Hello! This"}))["tokens"]
        assert len(tokens) == 2
        back = await post("/detokenize", {"model": "demo", "tokens": tokens})
        assert back["content"] == "Hello! This"
        assert (await post("/infill", gap))["content"]


# --- keep_alive


async def test_ollama_keep_alive(url: str, way: str) -> None:
    client = ollama.AsyncClient(host=url)
    forms: tuple[Any, ...] = ("10m", 300, "1h30m", "-1", -1)
    for form in forms:
        loaded = await client.chat("demo", [], keep_alive=form)
        assert loaded.done_reason == "load"
        assert (await client.generate("demo", keep_alive=form)).done_reason == "load"
    if WAYS[way] == "far":
        deadline = time.monotonic() + 30
        while not await never_expires(client):
            assert time.monotonic() < deadline, "the last keep_alive has not arrived"
            await asyncio.sleep(0.05)


async def never_expires(client: ollama.AsyncClient) -> bool:
    expirations = [
        running.expires_at for running in (await client.ps()).models if running.model == "demo:latest"
    ]
    expiration = expirations[0] if expirations else None
    return expiration is not None and expiration.timestamp() > time.time() + 10**8


async def test_ollama_keep_alive_that_is_none(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat("demo", ASK, keep_alive="soon")
    assert refused.value.status_code == 400
