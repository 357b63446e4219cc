"""One account of a stream's choices: llama-server counts each by itself as it ends."""

from __future__ import annotations

from typing import Any

import msgspec


class SummedUsage:
    """Takes the counts out of a stream's events, and gives their sum in a chunk of its own."""

    def __init__(self, a_prompt: int, *, counted: bool) -> None:
        """``a_prompt``: choices that share a prompt; ``counted``: the caller wants the sum."""
        self._a_prompt = a_prompt
        self._counted = counted
        self._last: dict[str, Any] = {}
        self._prompt = self._cached = self._made = self._ended = 0

    def event(self, raw: bytes) -> bytes:
        """An event without its counts; empty: it had nothing else."""
        if b'"usage"' not in raw:
            return raw
        try:
            event = msgspec.json.decode(raw)
            usage = event["usage"]
            prompt, made = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
            return raw
        self._prompt += prompt
        self._cached += cached
        self._made += made
        self._ended += 1
        self._last = {key: value for key, value in event.items() if key not in ("usage", "timings")}
        del event["usage"]
        return msgspec.json.encode(event) if event.get("choices") else b""

    def chunk(self) -> bytes:
        """The last chunk, with the sum; empty: nobody counted, or wants to know."""
        if not self._last or not self._counted:
            return b""
        # An Ollama gives one choice, however many were asked for.
        shared = min(self._a_prompt, self._ended)
        prompt = self._prompt // shared
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": self._made,
            "total_tokens": prompt + self._made,
            "prompt_tokens_details": {"cached_tokens": self._cached // shared},
        }
        return msgspec.json.encode({**self._last, "choices": [], "usage": usage})


def has_prompts(prompt: object) -> bool:
    """Whether what is to be completed is a list of several prompts, not the tokens of one."""
    return isinstance(prompt, list) and len(prompt) > 1 and not all(type(one) is int for one in prompt)


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The request of a whole answer as that of a stream with its counts: in no other form are all counted."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}
