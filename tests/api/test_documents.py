"""Files in the messages of OpenAI's clients: text is read, others leave a note rather than end the talk."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import error_of, post

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
PATHS = (CHAT, RESPONSES)
NOTES = base64.b64encode("grün und blau".encode()).decode()
PDF = base64.b64encode(b"%PDF-1.7 and more").decode()


def asking(path: str, file: dict[str, Any], *, in_result: bool = False) -> dict[str, Any]:
    """A request with a file, of the user or in what a tool gave."""
    if path == CHAT:
        part = {"type": "file", "file": file}
        content = [{"type": "text", "text": "Sum this up"}, part]
        said: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if in_result:
            call = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
            said = [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": [part]},
            ]
        return {"model": "demo", "messages": said}
    part = {"type": "input_file", **file}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Sum this up"}, part]}
    ]
    if in_result:
        items = [
            {"role": "user", "content": "go"},
            {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [part]},
        ]
    return {"model": "demo", "input": items}


def said_to(service: ScriptedService) -> str:
    """What the engine is told in the last message."""
    content = call_of(service).body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answering(path: str) -> ScriptedService:
    whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}}]}
    events = (whole,) if path == CHAT else (chunk("ok"), chunk(finish="stop"), usage_chunk())
    return ScriptedService(*events)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", [f"data:text/plain;base64,{NOTES}", NOTES])
async def test_a_file_with_text_is_read(path: str, data: str, serve: Serve, http: ClientSession) -> None:
    service = answering(path)
    url = await serve(parts(service))
    file = {"filename": "notes.txt", "file_data": data}
    status, answer, headers = await post(http, f"{url}{path}", asking(path, file))
    assert status == 200, answer
    assert "notes.txt:\ngrün und blau" in said_to(service)
    assert "X-Sollold-Warning" not in headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_result", [False, True])
@pytest.mark.parametrize(
    "file",
    [
        {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
        {"filename": "a.pdf", "file_data": "no base64 at all!"},
        {"filename": "a.pdf", "file_url": "https://example.org/a.pdf"},
        {"filename": "a.pdf", "file_id": "file-1"},
    ],
)
async def test_a_file_that_can_not_be_read_is_told_to_the_model_and_the_caller(
    path: str, in_result: bool, file: dict[str, Any], serve: Serve, http: ClientSession
) -> None:
    service = answering(path)
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    status, answer, headers = await post(http, f"{url}{path}", asking(path, file, in_result=in_result))
    assert status == 200, answer
    assert "(a.pdf) was left out" in said_to(service)
    assert "document is left out" in headers["X-Sollold-Warning"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_file_without_anything_is_refused(path: str, serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(answering(path)))
    status, answer, _ = await post(http, f"{url}{path}", asking(path, {"filename": "a.pdf"}))
    assert status == 400 and "file_data" in error_of(path, answer)


async def test_a_picture_by_id_is_refused_with_the_reason(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(answering(RESPONSES), model(capabilities=("completion", "vision"))))
    content = [{"type": "input_image", "file_id": "file-1"}]
    body = {"model": "demo", "input": [{"role": "user", "content": content}]}
    status, answer, _ = await post(http, f"{url}{RESPONSES}", body)
    assert status == 400 and "image_url" in error_of(RESPONSES, answer)
