"""Accepts a body of ``/v1/responses`` at ``/v1/chat/completions``, where Cursor sends it. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.openai.responses_request import input_messages
from sollold.models.model import Model

_RESPONSE_FIELDS = ("input", "instructions", "include", "text", "truncation", "max_output_tokens")
"""Fields that a chat completion does not have."""


def input_as_chat(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """Return ``body``, which has no messages, with its ``input`` converted to messages.

    Raises:
        Refusal: BAD_REQUEST if the input is invalid.
    """
    value = body["input"]
    if not isinstance(value, str | list):
        return body
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else value
    messages = input_messages(items, model)
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    chat = {key: value for key, value in body.items() if key not in _RESPONSE_FIELDS}
    if body.get("max_output_tokens") is not None:
        chat.setdefault("max_completion_tokens", body["max_output_tokens"])
    return {**chat, "messages": messages}
