"""An answer that its caller began: a conversation whose last message is the assistant's. Pure.

Ollama and Anthropic go on from it and send only what they add. llama-server does so too when
``continue_final_message`` says which part goes on, but only in a stream: an answer that it gives whole
repeats the beginning, which is taken off again here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

OF_LLAMA = ("continue_final_message", "add_generation_prompt")
"""The fields that ask llama-server for it; an Ollama needs none."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What stood there already. Empty: nothing."""

    content: str = ""
    reasoning: str = ""

    def cut(self, message: dict[str, Any]) -> None:
        """Take it off a whole answer's message, in place."""
        for name, begun in (("content", self.content), ("reasoning_content", self.reasoning)):
            said = message.get(name)
            if begun and isinstance(said, str):
                message[name] = said.removeprefix(begun)

    def cut_from(self, raw: bytes) -> bytes:
        """Take it off a whole answer of ``/v1/chat/completions``; what can't be read stays as it is."""
        if not self.content and not self.reasoning:
            return raw
        try:
            answer = msgspec.json.decode(raw)
            for choice in answer["choices"]:
                self.cut(choice["message"])
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            return raw
        return msgspec.json.encode(answer)


NOTHING = Begun()


def go_on(body: dict[str, Any]) -> Begun:
    """Have llama-server go on with the last message of ``body``, when that is an assistant's text.

    A caller who uses llama-server's own words for it is left to it.
    """
    messages = body.get("messages") or [{}]
    last = messages[-1]
    if last.get("role") != "assistant" or last.get("tool_calls") or any(name in body for name in OF_LLAMA):
        return NOTHING
    content = last.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    reasoning = last.get("reasoning_content") or ""
    body["add_generation_prompt"] = False
    body["continue_final_message"] = "content" if content or not reasoning else "reasoning_content"
    return Begun(content, reasoning)
