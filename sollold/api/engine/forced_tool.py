"""Enforces ``tool_choice: required`` from the first token: llama-server alone allows text before the call.

The request is first sent for a call in the model's own format. If the answer begins with text, or ends
without a call, it is sent again with the call as the response format, a JSON object of the tool's name and
arguments, which is converted to a tool call in the answer. The tools stay in the prompt.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from sollold.api.engine.begun_answer import begins_with_call
from sollold.api.engine.chunks import edit_each
from sollold.api.engine.retry import end_of, ending, with_llama_body
from sollold.cluster.net.pour import pushed
from sollold.errors import Fault, Refusal
from sollold.serving.request import Answer, Ask, Engine, Service, Waiting
from sollold.undecodable import UNDECODABLE

_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_OPENING_FENCE = re.compile(r"\s*+```(?:json)?\s*+")


class ForcedToolService:
    """A `Service` that requests a required call as a format if the model does not begin with a call."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`; for a required call it returns once the answer has begun."""
        call = ask.calls.get(Engine.LLAMA)
        if call is None or not _is_forced(ask, call.body):
            return self.service.open(ask, on_wait)
        return self._open_forced(ask, on_wait, call.body["tools"])

    async def _open_forced(self, ask: Ask, on_wait: Callable[[Waiting], None], tools: list[Any]) -> Answer:
        end = end_of(ask)
        answer = await self.service.open(ask, on_wait)
        if answer.routing.engine is not Engine.LLAMA:
            return answer
        calls, answer = await begins_with_call(answer, or_thought=True)
        if calls:
            return answer
        await answer.end()
        forced = with_llama_body(ask, {"tool_choice": "none", "response_format": _as_format(tools)})
        try:
            answer = await self.service.open(ending(forced, end), on_wait)
        except Refusal as refusal:
            if refusal.fault is Fault.ENGINE and refusal.status >= 500:
                raise
            if refusal.fault not in (Fault.ENGINE, Fault.BAD_REQUEST):
                raise
            # The engine can't convert the format: text is better than nothing.
            return await self.service.open(ending(ask, end), on_wait)
        if answer.routing.engine is Engine.LLAMA:
            part = "delta" if ask.stream or ask.gathered else "message"
            return Answer(answer.routing, pushed(_translated(answer.batches, part)), answer.close)
        return answer


def _is_forced(ask: Ask, body: dict[str, Any]) -> bool:
    """Whether to enforce a call. Not if the model thinks first, or continues an answer that is no call."""
    if body.get("tool_choice") != "required" or not body.get("tools"):
        return False
    thinks = ask.resolved is not None and "thinking" in ask.resolved.model.capabilities
    return not thinks and "response_format" not in body and "continue_final_message" not in body


def _as_format(tools: list[Any]) -> dict[str, Any]:
    """Return the response format of a call of one of ``tools``."""
    if len(tools) == 1:
        schema = _call_schema(tools[0]["function"], "#")
    else:
        schema = {"anyOf": [_call_schema(t["function"], f"#/anyOf/{i}") for i, t in enumerate(tools)]}
    return {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}


def _call_schema(function: dict[str, Any], location: str) -> dict[str, Any]:
    """Return the schema of a call; ``location``: its pointer in the document."""
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(arguments, f"{location}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, location: str) -> Any:
    """Return a schema that was a document, with its references as at ``location`` in another document."""
    if isinstance(schema, list):
        return [_moved(part, location) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(part, location) for name, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = location + reference[1:]
    return moved


async def _translated(batches: AsyncIterator[list[bytes]], part: str) -> AsyncIterator[list[bytes]]:
    texts: dict[int, str] = {}
    async for batch in batches:
        yield [_translated_event(raw, texts, part) for raw in batch]


def _translated_event(raw: bytes, texts: dict[int, str], part: str) -> bytes:
    if not raw:
        # An empty event: discard the earlier ones.
        texts.clear()
        return raw
    return edit_each(raw, lambda choice: _translate(choice, texts, part))


def _translate(choice: dict[str, Any], texts: dict[int, str], part: str) -> None:
    """Collect a choice's text, and replace it with the call at its end; changes ``choice``."""
    message, index = choice.setdefault(part, {}), choice.get("index", 0)
    texts[index] = texts.get(index, "") + (message.pop("content", None) or "")
    if part == "message":
        message["content"] = ""
    if not choice.get("finish_reason"):
        return
    call = _call_in(texts.pop(index))
    if isinstance(call, str):
        message["content"] = call
        return
    message["tool_calls"] = [{"index": 0, **call}] if part == "delta" else [call]
    if choice["finish_reason"] == "stop":
        choice["finish_reason"] = "tool_calls"


def _without_fences(text: str) -> str:
    if opening := _OPENING_FENCE.match(text):
        text = text[opening.end() :]
    stripped = text.rstrip()
    return stripped.removesuffix("```").rstrip() if stripped.endswith("```") else text


def _call_in(text: str) -> dict[str, Any] | str:
    """Return the call in ``text``, even if it was cut off; the text without code fences if it is none."""
    text = _without_fences(text)
    beginning = _BEGINNING.match(text)
    if beginning is None:
        return text
    name = msgspec.json.decode(beginning[1])
    try:
        arguments = msgspec.json.encode(msgspec.json.decode(text)["arguments"]).decode()
    except (*UNDECODABLE, KeyError, TypeError):
        arguments = text[beginning.end() :]
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
