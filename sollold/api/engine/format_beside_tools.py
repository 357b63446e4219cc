"""A format of the answer beside tools: llama-server enforces it from the first token on, so that no tool
could ever be called.

The model is asked without the format first. If it begins with a call, that is the answer; if with a text, it
is asked again with the format and without calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec

from sollold.api.engine.begun_answer import closed, joined
from sollold.serving.request import Answer, Ask, Engine, Service, Waiting

_FORMATS = ("response_format", "json_schema")


class FormatBesideToolsService:
    """A `Service` that lets tools be called where a format was asked for as well."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """As `Service.open`; it returns once the answer has begun."""
        call = ask.calls.get(Engine.LLAMA)
        if call is None or not _has_both(call.body):
            return await self.service.open(ask, on_wait)
        free = {key: value for key, value in call.body.items() if key not in _FORMATS}
        first = replace(ask, calls={**ask.calls, Engine.LLAMA: replace(call, body=free)})
        formed = replace(call, body={**call.body, "tool_choice": "none"})
        second = replace(ask, calls={**ask.calls, Engine.LLAMA: formed})
        if ask.delivered is not None and ask.delivered.content:
            # The rest of a text.
            return await self.service.open(second, on_wait)
        answer = await self.service.open(first, on_wait)
        if answer.routing.engine is not Engine.LLAMA or call.body.get("tool_choice") == "required":
            return answer
        part = "delta" if ask.stream or ask.gathered else "message"
        begun: list[list[bytes]] = []
        try:
            is_text = await _is_text(answer.batches, part, begun)
        except BaseException:
            await closed(answer)
            raise
        if not is_text:
            return Answer(answer.routing, joined(begun, answer.batches), answer.close)
        await closed(answer)
        return await self.service.open(second, on_wait)


def _has_both(body: dict[str, Any]) -> bool:
    wanted = body.get("response_format")
    formed = isinstance(wanted, dict) and wanted.get("type") not in (None, "text")
    asked = formed or bool(body.get("json_schema"))
    begun = "continue_final_message" in body
    return asked and not begun and bool(body.get("tools")) and body.get("tool_choice") != "none"


async def _is_text(batches: AsyncIterator[list[bytes]], part: str, begun: list[list[bytes]]) -> bool:
    """Whether the answer is a text, after what the model thinks; all that was read is put into ``begun``."""
    async for batch in batches:
        begun.append(batch)
        for raw in batch:
            if not raw:
                begun.clear()
            elif (text := _shows_text(raw, part)) is not None:
                return text
    return False


def _shows_text(raw: bytes, part: str) -> bool | None:
    """Whether an event shows that the answer is a text (True) or a call; None: neither yet."""
    try:
        for choice in msgspec.json.decode(raw)["choices"]:
            said = choice.get(part) or {}
            if said.get("tool_calls"):
                return False
            if (said.get("content") or "").strip() or choice.get("finish_reason"):
                return True
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return False
    return None
