"""What is asked for more seldom, through the official clients: streamed and not where a dialect has both."""

from __future__ import annotations

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


# --- the form of an answer


async def test_ollama_schema_streamed(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    parts = [part async for part in await client.chat("random", ASK, format=SCHEMA, stream=True)]
    assert keys("".join(part.message.content or "" for part in parts)) == {"age", "tall"}
    written = await client.generate("random", "x", format=SCHEMA, stream=True)
    assert keys("".join([part.response async for part in written])) == {"age", "tall"}


async def test_ollama_json(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    wish: dict[str, Any] = {"format": "json", "options": {"num_predict": 24, "temperature": 0}}
    whole = await client.chat("random", ASK, **wish)
    assert (whole.message.content or "").lstrip().startswith("{")
    parts = [part async for part in await client.chat("random", ASK, stream=True, **wish)]
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
        wish: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
        whole = await client.chat.completions.create(
            model="random", messages=ASK, response_format=plain, **wish
        )
        assert (whole.choices[0].message.content or "").lstrip().startswith("{")
        assert (await streamed(plain, **wish)).lstrip().startswith("{")


async def test_anthropic_schema(url: str) -> None:
    shape: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    wish: dict[str, Any] = {"model": "random", "max_tokens": 200, "messages": ASK, "output_config": shape}
    async with claude(url) as client:
        whole = await client.messages.create(**wish)
        assert whole.content[0].type == "text" and keys(whole.content[0].text) == {"age", "tall"}
        async with client.messages.stream(**wish) as stream:
            text = "".join([piece async for piece in stream.text_stream])
        assert keys(text) == {"age", "tall"}


# --- logprobs


async def test_ollama_logprobs_streamed_and_of_a_text(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    wish: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "options": {"num_predict": 2}}
    streamed = [part async for part in await client.chat("demo", ASK, stream=True, **wish)]
    told = [one for part in streamed for one in part.logprobs or ()]
    assert GREETING.startswith("".join(one.token for one in told)) and len(told) == 2
    assert told[0].top_logprobs and told[0].top_logprobs[0].token == told[0].token
    text = await client.generate("demo", "Hi", **wish)
    assert [one.token for one in text.logprobs or ()] == [one.token for one in told]


async def test_openai_logprobs_streamed(url: str) -> None:
    async with chatgpt(url) as client:
        told = []
        async for part in await client.chat.completions.create(
            model="demo", messages=ASK, max_tokens=2, logprobs=True, top_logprobs=2, stream=True
        ):
            for choice in part.choices:
                told += (choice.logprobs.content or []) if choice.logprobs else []
        assert GREETING.startswith("".join(one.token for one in told)) and len(told) == 2
        assert told[0].top_logprobs[0].token == told[0].token


# --- tools and thinking


async def test_openai_tool_choice_none(url: str) -> None:
    """An Ollama has no ``tool_choice``: it is not told of the tools."""
    async with chatgpt(url) as client:
        wish: dict[str, Any] = {"model": "call", "messages": ASK, "tools": [TOOL], "tool_choice": "none"}
        whole = await client.chat.completions.create(**wish)
        said = whole.choices[0].message
        assert not said.tool_calls and said.content == CALL and whole.choices[0].finish_reason == "stop"
        parts = [part async for part in await client.chat.completions.create(**wish, stream=True)]
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
    # The template writes the level into the prompt; each of its letters is a token.
    assert [counts[level] - counts["low"] for level in LEVELS] == [len(level) - 3 for level in LEVELS]
    silent = await client.chat("think", ASK, think=False)
    assert silent.message.thinking is None and CONCLUSION in (silent.message.content or "")
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat("demo", ASK, think="high")
    assert refused.value.status_code == 400


async def test_openai_reasoning_effort_reaches_the_template(url: str) -> None:
    async with chatgpt(url) as client:
        counts, others = [], []
        for level in LEVELS:
            effort: Any = level
            whole = await client.chat.completions.create(model="think", messages=ASK, reasoning_effort=effort)
            counts.append(whole.usage.prompt_tokens if whole.usage else 0)
            answer = await client.responses.create(model="think", input=ASK, reasoning={"effort": effort})
            others.append(answer.usage.input_tokens if answer.usage else 0)
        wanted = [len(level) - 3 for level in LEVELS]
        assert [count - counts[0] for count in counts] == wanted
        assert [count - others[0] for count in others] == wanted


# --- a gap in a text, and tokens


async def test_ollama_suffix(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    wish: dict[str, Any] = {"suffix": " three", "options": {"num_predict": 6, "temperature": 0}}
    whole = await client.generate("fill", "one ", **wish)
    assert whole.response and whole.done_reason == "length" and whole.eval_count == 6
    parts = [part async for part in await client.generate("fill", "one ", stream=True, **wish)]
    assert "".join(part.response for part in parts) == whole.response
    with pytest.raises(ollama.ResponseError, match="does not support") as refused:
        await client.generate("demo", "one ", suffix=" three")
    assert refused.value.status_code == 400


async def test_openai_suffix(url: str) -> None:
    async with chatgpt(url) as client:
        wish: dict[str, Any] = {"model": "fill", "prompt": "one ", "suffix": " three"}
        wish |= {"max_tokens": 6, "temperature": 0}
        whole = await client.completions.create(**wish)
        assert whole.choices[0].text and whole.choices[0].finish_reason == "length"
        text = ""
        async for part in await client.completions.create(**wish, stream=True):
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


# --- how long a model stays


async def test_ollama_keep_alive(url: str, way: str) -> None:
    client = ollama.AsyncClient(host=url)
    forms: tuple[Any, ...] = ("10m", 300, "1h30m", "-1", -1)
    for form in forms:
        loaded = await client.chat("demo", [], keep_alive=form)
        assert loaded.done_reason == "load"
        assert (await client.generate("demo", keep_alive=form)).done_reason == "load"
    if WAYS[way] == "far":
        deadline = time.monotonic() + 30
        while not await stays_for_ever(client):
            assert time.monotonic() < deadline, "the last word on how long it stays is not seen"


async def stays_for_ever(client: ollama.AsyncClient) -> bool:
    stay = [one.expires_at for one in (await client.ps()).models if one.model == "demo:latest"]
    return bool(stay and stay[0]) and stay[0].timestamp() > time.time() + 10**8


async def test_ollama_keep_alive_that_is_none(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat("demo", ASK, keep_alive="soon")
    assert refused.value.status_code == 400
