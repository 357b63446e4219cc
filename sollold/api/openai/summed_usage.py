"""Sums the usage over a stream's choices: llama-server reports that of each choice as it ends."""

from __future__ import annotations

from typing import Any

import msgspec


class SummedUsage:
    """Removes the usage from a stream's events, and provides the sum in a separate chunk."""

    def __init__(self, choices: int, *, counted: bool) -> None:
        """``a_prompt``: choices per prompt; ``counted``: whether the caller wants the sum."""
        self._choices = choices
        self._counted = counted
        self._last: dict[str, Any] = {}
        self._prompt = self._cached = self._generated = self._ended = 0

    def event(self, raw: bytes) -> bytes:
        """Return an event without its usage; empty if it has nothing else."""
        if b'"usage"' not in raw:
            return raw
        try:
            event = msgspec.json.decode(raw)
            usage = event["usage"]
            prompt, generated = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
            return raw
        self._prompt += prompt
        self._cached += cached
        self._generated += generated
        self._ended += 1
        self._last = {key: value for key, value in event.items() if key not in ("usage", "timings")}
        del event["usage"]
        return msgspec.json.encode(event) if event.get("choices") else b""

    def chunk(self) -> bytes:
        """Return the last chunk, with the sum; empty if there is none, or the caller does not want it."""
        if not self._last or not self._counted:
            return b""
        # An Ollama returns one choice, however many were requested.
        divisor = min(self._choices, self._ended)
        prompt = self._prompt // divisor
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": self._cached // divisor},
        }
        return msgspec.json.encode({**self._last, "choices": [], "usage": usage})


def has_several_prompts(prompt: object) -> bool:
    """Whether a completion's prompt is a list of several prompts, not the tokens of one."""
    return isinstance(prompt, list) and len(prompt) > 1 and not all(type(token) is int for token in prompt)


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """Return a request for a stream with its usage: only a stream reports the usage of all choices."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}
