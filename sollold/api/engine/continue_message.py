"""Continues a partial answer sent by the caller as the conversation's last message. Pure.

Ollama and Anthropic continue it and return only the addition. llama-server does so too when
``continue_final_message`` names the field, but only in a stream: a non-streamed answer repeats the
beginning, which is removed here.
"""

from __future__ import annotations

from typing import Any

from sollold.api.engine.chunks import edit_each
from sollold.facts import dataclass

CONTINUE_FIELDS = ("continue_final_message", "add_generation_prompt")
"""llama-server's fields that request this; an Ollama needs none."""


@dataclass(frozen=True, slots=True)
class AnswerPrefix:
    """The beginning of the answer as sent by the caller; empty if none was sent."""

    content: str = ""
    reasoning: str = ""

    def _cut(self, choice: dict[str, Any]) -> None:
        message = choice["message"]
        for name, prefix in (("content", self.content), ("reasoning_content", self.reasoning)):
            value = message.get(name)
            if prefix and isinstance(value, str):
                message[name] = value.removeprefix(prefix)

    def cut_from(self, raw: bytes) -> bytes:
        """Remove it from a non-streamed ``/v1/chat/completions`` answer; an unreadable one is unchanged."""
        return edit_each(raw, self._cut) if self.content or self.reasoning else raw


NO_PREFIX = AnswerPrefix()


def continue_last_message(body: dict[str, Any]) -> AnswerPrefix:
    """Make llama-server continue the last message of ``body`` if it is an assistant's text.

    If the caller has set llama-server's own fields for this, nothing is changed.
    """
    messages = body.get("messages") or [{}]
    last = messages[-1]
    if (
        last.get("role") != "assistant"
        or last.get("tool_calls")
        or any(name in body for name in CONTINUE_FIELDS)
    ):
        return NO_PREFIX
    content = last.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
        # One part: with several, a non-streamed answer would repeat something else.
        body["messages"] = [*messages[:-1], {**last, "content": content}]
    reasoning = last.get("reasoning_content") or ""
    body["add_generation_prompt"] = False
    body["continue_final_message"] = "content" if content or not reasoning else "reasoning_content"
    return AnswerPrefix(content, reasoning)
