"""Reorders a conversation that a chat template rejects, or finally refuses it with the template's reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from sollold.api.engine.conversation import Message, flatten, tidy
from sollold.api.engine.retry import RevisingService
from sollold.errors import Fault, Refusal
from sollold.serving.engine_error import TEMPLATE_REFUSES
from sollold.serving.request import Ask, Call

_RAISED = re.compile(r"^Error: *(?:Jinja Exception: *)?(.+)|Jinja Exception: *(.+)", re.MULTILINE)
_SIGNS = ("Jinja Exception", "While executing", "assistant messages at the end of the list")
_FORMS = (tidy, flatten)


def template_refusal(message: str) -> str | None:
    """Return why a chat template rejected a conversation, in its words; None if it is another error."""
    if message.startswith(TEMPLATE_REFUSES):
        return message.removeprefix(TEMPLATE_REFUSES)
    if not any(sign in message for sign in _SIGNS):
        return None
    match = _RAISED.search(message)
    return " ".join((match[1] or match[2]).split()) if match else message.splitlines()[0]


def _in_form(call: Call, form: Callable[[Sequence[Message]], list[Message]]) -> Call:
    messages = call.body.get("messages")
    return replace(call, body={**call.body, "messages": form(messages)}) if messages else call


class TemplateFallbackService(RevisingService):
    """Retries with the conversation in the next simpler form if a template rejects it."""

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
        return Refusal(Fault.BAD_REQUEST, TEMPLATE_REFUSES + reason[:300])

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        return ("the messages were merged and reordered as the model's chat template requires",)
