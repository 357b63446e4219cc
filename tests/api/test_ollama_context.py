"""A context that the caller names reaches an Ollama as it is, and what that then refuses is the caller's."""

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
    ("path", "asked"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
        ("/api/generate", {"prompt": LONG}),
    ],
)
async def test_less_than_the_prompt_needs_is_refused_where_nothing_may_be_left_out(
    at_ollama: str, http: ClientSession, path: str, asked: dict[str, Any]
) -> None:
    body = {"model": "demo", "stream": False, "options": {"num_ctx": 16}, **asked}
    for _ in range(3):
        status, answer, _ = await post(http, at_ollama + path, {**body, "truncate": False})
        assert status == 400 and "exceeds the available context size" in answer["error"]
        assert not answer["error"].startswith("{"), "the engine's JSON within"
    # It was no fault of the Ollama, which answers what fits.
    status, _, _ = await post(http, at_ollama + path, {**body, "options": {"num_ctx": 512, "num_predict": 3}})
    assert status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
        ("/api/generate", {"prompt": LONG}),
    ],
)
async def test_less_than_the_prompt_needs_is_told_where_an_ollama_leaves_out_the_rest(
    at_ollama: str, http: ClientSession, path: str, asked: dict[str, Any], stream: bool
) -> None:
    async def warnings(context: int) -> list[str]:
        options = {"num_ctx": context, "num_predict": 3}
        body = {"model": "demo", "stream": stream, "options": options, **asked}
        async with http.post(at_ollama + path, json=body) as answer:
            last = json.loads((await answer.text()).strip().splitlines()[-1])
        return list(last["_routing"].get("warnings", ()))

    (told,) = await warnings(16)
    assert "context of 16 tokens" in told
    assert await warnings(512) == []


@pytest.mark.parametrize("path", PATHS[1:])
async def test_a_stream_of_events_tells_it_in_a_comment(
    at_ollama: str, http: ClientSession, path: str
) -> None:
    """Its headers are gone when the Ollama says what it has read."""
    messages = [{"role": "user", "content": "one two three " * 2000}, {"role": "user", "content": "Hi"}]
    async with http.post(at_ollama + path, json=body_of(path, "demo", messages, stream=True)) as answer:
        comments = [line async for line in answer.content if line.startswith(b": warning")]
    assert answer.status == 200 and b"longer than the context" in b"".join(comments)


@pytest.mark.parametrize("path", PATHS)
async def test_every_dialect_is_answered_by_an_ollama(at_ollama: str, http: ClientSession, path: str) -> None:
    status, answer, _ = await post(
        http, at_ollama + path, body_of(path, "demo", [{"role": "user", "content": "Hi"}])
    )
    assert status == 200 and GREETING.startswith(text_of(path, answer))
    assert text_of(path, answer)
    body = body_of(path, "demo", [{"role": "user", "content": "Hi"}], stream=True)
    async with http.post(at_ollama + path, json=body) as streamed:
        assert streamed.status == 200 and "Hello" in await streamed.text()


async def test_what_is_clear_is_no_error_of_an_ollama(at_ollama: str, http: ClientSession) -> None:
    """It answers 500 or 400 to each of these as they come."""
    call = {"function": {"name": "get_time", "arguments": '{"zone": "utc"}'}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [{"role": "user", "content": "a"}, said, {"role": "tool", "content": "noon"}]
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
