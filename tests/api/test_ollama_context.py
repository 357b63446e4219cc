"""A requested context size reaches Ollama unchanged; a refusal because of it is a bad request."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.models.gguf.demo_model import GREETING
from tests.api.dialects import PATHS, body_of, post, text_of
from tests.api.picture import png

pytestmark = [pytest.mark.llama, pytest.mark.clients]

LONG = "one two three " * 20


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
        ("/api/generate", {"prompt": LONG}),
    ],
)
async def test_a_prompt_longer_than_the_context_is_refused_without_truncation(
    at_ollama: str, http: ClientSession, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": "demo", "stream": False, "options": {"num_ctx": 16}, **fields}
    for _ in range(3):
        status, answer, _ = await post(http, at_ollama + path, {**body, "truncate": False})
        assert status == 400 and "exceeds the available context size" in answer["error"]
        assert not answer["error"].startswith("{"), "the error must not contain the engine's JSON"
    # It doesn't count as a fault of Ollama, which still answers.
    status, _, _ = await post(http, at_ollama + path, {**body, "options": {"num_ctx": 512, "num_predict": 3}})
    assert status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
        ("/api/generate", {"prompt": LONG}),
    ],
)
async def test_truncation_by_ollama_causes_a_warning(
    at_ollama: str, http: ClientSession, path: str, fields: dict[str, Any], stream: bool
) -> None:
    async def warnings(context: int) -> list[str]:
        options = {"num_ctx": context, "num_predict": 3}
        body = {"model": "demo", "stream": stream, "options": options, **fields}
        async with http.post(at_ollama + path, json=body) as answer:
            last = json.loads((await answer.text()).strip().splitlines()[-1])
        return list(last["_routing"].get("warnings", ()))

    (warning,) = await warnings(16)
    assert "context of 16 tokens" in warning
    assert await warnings(512) == []


@pytest.mark.parametrize("path", PATHS[1:])
async def test_an_event_stream_has_the_warning_in_a_comment(
    at_ollama: str, http: ClientSession, path: str
) -> None:
    """Headers are sent before Ollama reports how many tokens it read."""
    messages = [{"role": "user", "content": "one two three " * 2000}, {"role": "user", "content": "Hi"}]
    async with http.post(at_ollama + path, json=body_of(path, "demo", messages, stream=True)) as answer:
        comments = [line async for line in answer.content if line.startswith(b": warning")]
    assert answer.status == 200 and b"longer than the context" in b"".join(comments)


@pytest.mark.parametrize("path", PATHS)
async def test_ollama_answers_every_dialect(at_ollama: str, http: ClientSession, path: str) -> None:
    status, answer, _ = await post(
        http, at_ollama + path, body_of(path, "demo", [{"role": "user", "content": "Hi"}])
    )
    assert status == 200 and GREETING.startswith(text_of(path, answer))
    assert text_of(path, answer)
    body = body_of(path, "demo", [{"role": "user", "content": "Hi"}], stream=True)
    async with http.post(at_ollama + path, json=body) as streamed:
        assert streamed.status == 200 and "Hello" in await streamed.text()


async def test_fields_in_unusual_forms_are_converted_for_ollama(at_ollama: str, http: ClientSession) -> None:
    """Ollama answers 500 or 400 to each of these in its original form."""
    call = {"function": {"name": "get_time", "arguments": '{"zone": "utc"}'}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [{"role": "user", "content": "a"}, assistant, {"role": "tool", "content": "noon"}]
    options = {"num_ctx": "1024", "temperature": "0", "stop": "x", "num_predict": 3.0}
    body = {"model": "call", "messages": messages, "stream": False, "options": options, "think": ""}
    status, answer, _ = await post(http, f"{at_ollama}/api/chat", body)
    assert status == 200, answer
    picture = {
        "model": "see",
        "prompt": "a",
        "images": [f"data:image/png;base64,{base64.b64encode(png()).decode()}"],
    }
    status, answer, _ = await post(http, f"{at_ollama}/api/generate", {**picture, "stream": False})
    assert status == 200, answer
