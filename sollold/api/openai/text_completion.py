"""Builds OpenAI's text completions from events that have a form of their own. Pure."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from sollold.api.openai.request import Completion


class TextCompletion:
    """One answer: its chunks as server-sent events, or the whole answer as an object."""

    def __init__(self, ask: Completion, model: str) -> None:
        self._counted = ask.stream_options is not None and bool(ask.stream_options.include_usage)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def events(self, choice: dict[str, Any], prompt: int, generated: int) -> bytes:
        """Return the chunk with this choice; after the last also the usage, if the caller wants it."""
        chunks = [{**self._head, "choices": [choice]}]
        if choice["finish_reason"] is not None and self._counted:
            chunks.append({**self._head, "choices": [], "usage": _usage(prompt, generated)})
        return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)

    def whole(self, choice: dict[str, Any], prompt: int, generated: int) -> bytes:
        """Return the whole answer."""
        return msgspec.json.encode({**self._head, "choices": [choice], "usage": _usage(prompt, generated)})


def choice_of(text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    """Return the only choice of a chunk or of an answer."""
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _usage(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
