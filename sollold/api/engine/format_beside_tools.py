"""Allows a response format beside tools: engines enforce it from the first token, so no tool could be called.

The request is first sent without the format. If the answer begins with a call, it is returned; if with text,
the request is sent again with the format and without calls.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from sollold.api.engine.begun_answer import begins_with_call
from sollold.api.engine.retry import end_of, ending
from sollold.serving.request import Answer, Ask, Call, Engine, Service, Waiting

_FORMATS = ("response_format", "json_schema", "format")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


class FormatBesideToolsService:
    """A `Service` that lets tools be called although a format was requested as well."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`; if both are requested, it returns once the answer has begun."""
        engines = [engine for engine, call in ask.calls.items() if _has_both(call.body)]
        return self._open_both(ask, on_wait, engines) if engines else self.service.open(ask, on_wait)

    async def _open_both(self, ask: Ask, on_wait: Callable[[Waiting], None], engines: list[Engine]) -> Answer:
        plain = replace(ask, calls={**ask.calls, **{e: _plain(ask.calls[e]) for e in engines}})
        formatted = replace(ask, calls={**ask.calls, **{e: _formatted(e, ask.calls[e]) for e in engines}})
        if ask.delivered is not None and ask.delivered.content:
            # The rest of an answer that began as text.
            return await self.service.open(formatted, on_wait)
        end = end_of(ask)
        answer = await self.service.open(plain, on_wait)
        engine = answer.routing.engine
        if engine not in engines or ask.calls[engine].body.get("tool_choice") == "required":
            return answer
        calls, answer = await begins_with_call(answer)
        if calls is not False:
            return answer
        await answer.end()
        return await self.service.open(ending(formatted, end), on_wait)


def _has_both(body: dict[str, Any]) -> bool:
    if not body.get("tools"):
        return False
    format_ = body.get("response_format")
    has_format = isinstance(format_, dict) and format_.get("type") not in (None, "text")
    requested = has_format or bool(body.get("json_schema")) or bool(body.get("format"))
    continues = "continue_final_message" in body
    return requested and not continues and body.get("tool_choice") != "none"


def _plain(call: Call) -> Call:
    return replace(call, body={key: value for key, value in call.body.items() if key not in _FORMATS})


def _formatted(engine: Engine, call: Call) -> Call:
    if engine is Engine.LLAMA:
        # The tools stay in the prompt, so that its cache remains valid.
        return replace(call, body={**call.body, "tool_choice": "none"})
    return replace(call, body={key: value for key, value in call.body.items() if key not in _TOOLS})
