"""Services that retry what an engine refused in a form that it accepts; `TolerantService` combines them."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec.structs import replace

from sollold.api.engine.conversation import Message, flatten, tidy
from sollold.api.engine.forced_tool import ForcedToolService
from sollold.api.engine.format_beside_tools import FormatBesideToolsService
from sollold.api.engine.retry import RevisingService, with_llama_body
from sollold.api.engine.single_call import SingleCallService
from sollold.api.engine.tool_text import ToolTextService
from sollold.api.engine.tools import unconstrained_tool
from sollold.errors import Refusal, bad_request
from sollold.serving.engine_error import TEMPLATE_REFUSES
from sollold.serving.request import Answer, Ask, Call, Engine, Service, Waiting


class CachedImagesService(RevisingService):
    """Retries once without the prompt cache if llama-server loses its place among a cached prompt's images.

    This happens if a prompt ends or differs after an image that the previous prompt contained twice: each
    request fails with 500 "Chunk not found" until another prompt has taken the slot.
    """

    tries = 1

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        if Engine.LLAMA not in ask.calls or "Chunk not found" not in refusal.message:
            return None
        return with_llama_body(ask, {"cache_prompt": False})


_SCHEMA_SIGNS = (
    "JSON schema error",
    "JSON schema conversion failed",
    "failed to parse grammar",
    "Failed to parse tools",
)


class SchemaFallbackService(RevisingService):
    """Retries with unconstrained arguments for the tools, and their schemas in the descriptions, if llama.cpp
    rejects one of them; a format's schema is refused.
    """

    tries = 1

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        call = ask.calls.get(Engine.LLAMA)
        if call is None or not _is_schema_refusal(refusal.message) or not call.body.get("tools"):
            return None
        return with_llama_body(ask, {"tools": [unconstrained_tool(tool) for tool in call.body["tools"]]})

    def _final(self, refusal: Refusal) -> Refusal:
        if not _is_schema_refusal(refusal.message):
            return refusal
        reason = refusal.message.rsplit("failed:", 1)[-1].split("; tools =")[0]
        return bad_request(f"the schema can't be enforced: {' '.join(reason.split())[:300]}")

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        return ("the schemas of the tools are not enforced: llama.cpp can't convert one of them",)


def _is_schema_refusal(message: str) -> bool:
    return any(sign in message for sign in _SCHEMA_SIGNS)


_RAISED = re.compile(r"^Error: *(?:Jinja Exception: *)?(.+)|Jinja Exception: *(.+)", re.MULTILINE)
_TEMPLATE_SIGNS = ("Jinja Exception", "While executing", "assistant messages at the end of the list")
_FORMS = (tidy, flatten)


def template_refusal(message: str) -> str | None:
    """Return why a chat template rejected a conversation, in its words; None if it is another error."""
    if message.startswith(TEMPLATE_REFUSES):
        return message.removeprefix(TEMPLATE_REFUSES)
    if not any(sign in message for sign in _TEMPLATE_SIGNS):
        return None
    match = _RAISED.search(message)
    return " ".join((match[1] or match[2]).split()) if match else message.splitlines()[0]


class TemplateFallbackService(RevisingService):
    """Retries with the conversation in the next simpler form if a template rejects it, or finally refuses it
    with the template's reason.
    """

    tries = len(_FORMS)

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        if template_refusal(refusal.message) is None:
            return None
        for form in _FORMS[attempt:]:
            # Either engine may be the next to answer.
            simpler = {engine: _in_form(call, form) for engine, call in ask.calls.items()}
            if simpler != ask.calls:
                return replace(ask, calls=simpler)
        return None

    def _final(self, refusal: Refusal) -> Refusal:
        reason = template_refusal(refusal.message)
        if reason is None:
            return refusal
        return bad_request(TEMPLATE_REFUSES + reason[:300])

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        return ("the messages were merged and reordered as the model's chat template requires",)


def _in_form(call: Call, form: Callable[[Sequence[Message]], list[Message]]) -> Call:
    messages = call.body.get("messages")
    return replace(call, body={**call.body, "messages": form(messages)}) if messages else call


class TolerantService:
    """Combines the services that retry; those that concern only tools are used by requests with tools."""

    def __init__(self, service: Service) -> None:
        self._plain = TemplateFallbackService(SchemaFallbackService(CachedImagesService(service)))
        with_calls = ForcedToolService(ToolTextService(self._plain))
        self._with_tools = SingleCallService(FormatBesideToolsService(with_calls))

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`."""
        has_tools = any(call.body.get("tools") for call in ask.calls.values())
        return (self._with_tools if has_tools else self._plain).open(ask, on_wait)
