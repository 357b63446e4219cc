"""Files in messages of OpenAI's clients: text files are inlined, others are replaced by a note."""

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


def request_with(path: str, file: dict[str, Any], *, in_result: bool = False) -> dict[str, Any]:
    """A request with a file in the user's message or in a tool's result."""
    if path == CHAT:
        part = {"type": "file", "file": file}
        content = [{"type": "text", "text": "Sum this up"}, part]
        conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if in_result:
            call = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
            conversation = [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": [part]},
            ]
        return {"model": "demo", "messages": conversation}
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


def last_text(service: ScriptedService) -> str:
    """The text of the last message sent to the engine."""
    content = call_of(service).body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def service_for(path: str) -> ScriptedService:
    whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}}]}
    events = (whole,) if path == CHAT else (chunk("ok"), chunk(finish="stop"), usage_chunk())
    return ScriptedService(*events)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", [f"data:text/plain;base64,{NOTES}", NOTES])
async def test_a_text_file_is_inlined(path: str, data: str, serve: Serve, http: ClientSession) -> None:
    service = service_for(path)
    url = await serve(parts(service))
    file = {"filename": "notes.txt", "file_data": data}
    status, answer, headers = await post(http, f"{url}{path}", request_with(path, file))
    assert status == 200, answer
    assert "notes.txt:\ngrün und blau" in last_text(service)
    assert "X-Sollold-Warning" not in headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", ["data:text/plain;base64,", ""])
async def test_a_long_text_file_is_inlined(path: str, prefix: str, serve: Serve, http: ClientSession) -> None:
    service = service_for(path)
    url = await serve(parts(service))
    text = "grün und blau, " * 50_000
    data = prefix + base64.b64encode(text.encode()).decode()
    status, answer, headers = await post(http, f"{url}{path}", request_with(path, {"file_data": data}))
    assert status == 200, answer
    assert text in last_text(service) and "X-Sollold-Warning" not in headers


@pytest.mark.parametrize("path", PATHS)
async def test_a_long_file_of_another_kind_is_left_out(path: str, serve: Serve, http: ClientSession) -> None:
    service = service_for(path)
    url = await serve(parts(service))
    data = base64.b64encode(b"%PDF-1.7" + bytes(range(256)) * 60_000).decode()
    status, answer, headers = await post(http, f"{url}{path}", request_with(path, {"file_data": data}))
    assert status == 200, answer
    assert "document was left out" in last_text(service) and "X-Sollold-Warning" in headers


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
async def test_an_unreadable_file_is_replaced_by_a_note_with_a_warning(
    path: str, in_result: bool, file: dict[str, Any], serve: Serve, http: ClientSession
) -> None:
    service = service_for(path)
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    status, answer, headers = await post(http, f"{url}{path}", request_with(path, file, in_result=in_result))
    assert status == 200, answer
    assert "(a.pdf) was left out" in last_text(service)
    assert "document is left out" in headers["X-Sollold-Warning"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_file_without_content_is_refused(path: str, serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(service_for(path)))
    status, answer, _ = await post(http, f"{url}{path}", request_with(path, {"filename": "a.pdf"}))
    assert status == 400 and "file_data" in error_of(path, answer)


async def test_an_image_by_file_id_is_refused(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(service_for(RESPONSES), model(capabilities=("completion", "vision"))))
    content = [{"type": "input_image", "file_id": "file-1"}]
    body = {"model": "demo", "input": [{"role": "user", "content": content}]}
    status, answer, _ = await post(http, f"{url}{RESPONSES}", body)
    assert status == 400 and "image_url" in error_of(RESPONSES, answer)
