"""Convert one conversation to each dialect, and read the answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from aiohttp import ClientSession

Message = dict[str, Any]
PATHS = ("/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages")


def body_of(path: str, model: str, messages: Sequence[Message], **more: Any) -> dict[str, Any]:
    """The body for ``path``. ``messages`` are in OpenAI's form; ``more`` is added unchanged."""
    limits: dict[str, Any] = {
        "/api/chat": {"options": {"num_predict": 5, "temperature": 0}},
        "/v1/chat/completions": {"max_tokens": 5, "temperature": 0},
        "/v1/responses": {"max_output_tokens": 5, "temperature": 0},
        "/v1/messages": {"max_tokens": 5, "temperature": 0},
    }
    body: dict[str, Any] = {"model": model, "stream": False, **limits[path]}
    if path == "/v1/responses":
        body["input"] = [item for message in messages for item in _items(message)]
    elif path == "/v1/messages":
        body["messages"] = [_blocks(message) for message in messages]
    else:
        body["messages"] = list(messages)
    return {**body, **more}


def _items(message: Message) -> list[Message]:
    if message["role"] == "tool":
        return [
            {
                "type": "function_call_output",
                "call_id": message.get("tool_call_id", "c0"),
                "output": message["content"],
            }
        ]
    items: list[Message] = []
    if message.get("content") or not message.get("tool_calls"):
        items.append({"role": message["role"], "content": message.get("content") or ""})
    calls = message.get("tool_calls", ())
    return items + [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]


def _blocks(message: Message) -> Message:
    if message["role"] == "tool":
        block = {"type": "tool_result", "tool_use_id": message.get("tool_call_id", "c0")}
        return {"role": "user", "content": [{**block, "content": message["content"]}]}
    blocks: list[Message] = []
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", ()):
        arguments = call["function"].get("arguments")
        with contextlib.suppress(TypeError, ValueError):
            arguments = json.loads(arguments)
        name = call["function"]["name"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": arguments})
    return {"role": message["role"], "content": blocks or ""}


def tools_of(path: str, *tools: Message) -> list[Message]:
    """Convert tools in OpenAI's form for ``path``."""
    if path == "/v1/responses":
        return [{**tool, **tool["function"]} for tool in tools]
    if path == "/v1/messages":
        named = ({**tool["function"], "input_schema": tool["function"].get("parameters")} for tool in tools)
        return [{key: value for key, value in tool.items() if key != "parameters"} for tool in named]
    return list(tools)


async def post(http: ClientSession, url: str, body: Any) -> tuple[int, Any, dict[str, str]]:
    """POST and return (status, JSON, headers)."""
    async with http.post(url, json=body) as answer:
        return answer.status, await answer.json(content_type=None), dict(answer.headers)


async def status_of(http: ClientSession, url: str, body: Any) -> int:
    """POST and return only the status."""
    async with http.post(url, json=body) as answer:
        await answer.read()
        return answer.status


def text_of(path: str, answer: dict[str, Any]) -> str:
    """The text of the assistant's answer."""
    if path == "/api/chat":
        return str(answer["message"]["content"])
    if path == "/v1/chat/completions":
        return str(answer["choices"][0]["message"]["content"])
    blocks = answer["content"] if path == "/v1/messages" else answer["output"][-1].get("content", [])
    return "".join(block.get("text", "") for block in blocks)


def error_of(path: str, answer: dict[str, Any]) -> str:
    """The error message."""
    return str(answer["error"] if path.startswith("/api") else answer["error"]["message"])
