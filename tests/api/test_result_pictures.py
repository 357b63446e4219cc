"""Images in results of tools, which agents repeat in each request."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import error_of, post
from tests.api.picture import PICTURE

URL = f"data:image/png;base64,{PICTURE}"
SOURCE = {"type": "base64", "media_type": "image/png", "data": PICTURE}
CALLED = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {
                "role": "tool",
                "tool_call_id": "c",
                "content": [
                    {"type": "text", "text": "shot"},
                    {"type": "image_url", "image_url": {"url": URL}},
                ],
            },
        ]
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "go"},
            {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [
                    {"type": "input_text", "text": "shot"},
                    {"type": "input_image", "image_url": URL},
                ],
            },
        ]
    },
    "/v1/messages": {
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "read", "input": {}}],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "c",
                        "content": [{"type": "text", "text": "shot"}, {"type": "image", "source": SOURCE}],
                    }
                ],
            },
        ],
    },
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("has_vision", [True, False])
async def test_an_image_in_a_result_is_left_out_for_a_model_without_vision(
    serve: Serve, http: ClientSession, path: str, has_vision: bool
) -> None:
    """Claude Code and Codex send images to any model."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    supported = ("completion", "tools", "vision") if has_vision else ("completion", "tools")
    url = await serve(parts(service, model(capabilities=supported)))
    async with http.post(url + path, json={"model": "demo", "stream": True, **REQUESTS[path]}) as answer:
        assert answer.status == 200, await answer.text()
        assert ("an image" in answer.headers.get("X-Sollold-Warning", "")) is not has_vision
    for engine in Engine:
        content = str(call_of(service, engine).body["messages"][2]["content"])
        assert "shot" in content
        assert ("image_url" in content) is has_vision and ("can't see" in content) is not has_vision


IMAGE_PART = {"type": "image_url", "image_url": {"url": URL}}
CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c", "content": "(see attached image)"},
]


@pytest.mark.parametrize("has_vision", [True, False])
@pytest.mark.parametrize(
    "content", [[IMAGE_PART], [{"type": "text", "text": "Attached image(s):"}, IMAGE_PART]]
)
async def test_an_image_after_a_result_is_left_out_for_a_model_without_vision(
    serve: Serve, http: ClientSession, content: list[Any], has_vision: bool
) -> None:
    """Cline and pi send images of a tool in a user message, as OpenAI's tool messages can't have any."""
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    supported = ("completion", "tools", "vision") if has_vision else ("completion", "tools")
    url = f"{await serve(parts(service, model(capabilities=supported)))}/v1/chat/completions"
    conversation = [*CALL, {"role": "user", "content": content}, {"role": "assistant", "content": "Seen."}]
    body = {"model": "demo", "stream": True, "messages": [*conversation, {"role": "user", "content": "and?"}]}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        assert ("an image" in answer.headers.get("X-Sollold-Warning", "")) is not has_vision
    for engine in Engine:
        sent = str(call_of(service, engine).body["messages"][3]["content"])
        assert ("image_url" in sent) is has_vision and ("can't see" in sent) is not has_vision


async def test_a_later_image_of_the_user_is_refused(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    url = f"{await serve(parts(service, model(capabilities=('completion', 'tools'))))}/v1/chat/completions"
    conversation = [
        *CALL,
        {"role": "assistant", "content": "Seen."},
        {"role": "user", "content": [IMAGE_PART]},
    ]
    status, answer, _ = await post(http, url, {"model": "demo", "messages": conversation})
    assert status == 400 and "does not support images" in error_of("/v1/chat/completions", answer)


@pytest.mark.parametrize("path", REQUESTS)
async def test_an_image_of_the_user_is_refused_for_a_model_without_vision(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService()
    url = await serve(parts(service))
    field = "input" if "input" in REQUESTS[path] else "messages"
    part: dict[str, Any] = {"type": "image", "source": SOURCE}
    if path != "/v1/messages":
        kind, picture = ("input_image", URL) if field == "input" else ("image_url", {"url": URL})
        part = {"type": kind, "image_url": picture}
    body = {"model": "demo", "max_tokens": 9, field: [{"role": "user", "content": [part]}]}
    status, answer, _ = await post(http, url + path, body)
    assert status == 400 and "does not support images" in error_of(path, answer)
    assert not service.asks
