"""Server-sent events of OpenAI's chat and completions: the engine's chunks are passed on nearly unread."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from sollold.api.engine.chunks import edit_each, with_shown_logprobs
from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix
from sollold.api.engine.encoders import SseEncoder
from sollold.serving.request import Engine, Routing
from sollold.undecodable import UNDECODABLE

_MODEL = re.compile(rb'("model"\s*:\s*)"((?:[^"\\]|\\.)*)"')
"""The field with the answer's model. Within generated text its quotes would be escaped."""


class SummedUsage:
    """Removes the usage from a stream's events, and provides the sum in a separate chunk.

    llama-server reports the usage of each choice as it ends.
    """

    def __init__(self, choices: int, *, counted: bool) -> None:
        """``choices``: number per prompt; ``counted``: whether the caller wants the sum."""
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
        except (*UNDECODABLE, KeyError, TypeError, ValueError, AttributeError):
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


class ChunkEncoder(SseEncoder):
    """`Encoder` of chat and completions: ``data:`` lines, then ``[DONE]``, or an error event."""

    def __init__(
        self,
        model: str,
        prefix: AnswerPrefix = NO_PREFIX,
        *,
        counted: bool = True,
        summed: SummedUsage | None = None,
        calls_function: bool = False,
        alternatives: int | None = None,
    ) -> None:
        """``model``: the caller's name for it; ``prefix``: the beginning of the answer that the caller sent;
        ``counted``: whether the caller wants the chunk with the usage, which is always requested of Ollama;
        ``summed``: the sum of the usage, for a streamed completion or a chat with several choices;
        ``calls_function``: whether the caller expects a ``function_call``, not ``tool_calls``;
        ``alternatives``: number of alternatives per token, for a chat with log-probabilities.
        """
        self._calls_function = calls_function
        self._alternatives = alternatives
        self._summed = summed
        self._counted = counted
        self._named = b'"model":' + msgspec.json.encode(model)
        self._engines_name = b""
        self._prefix = prefix

    def _rewrite(self, raw: bytes) -> bytes:
        """Return an event or a whole answer as clients expect it, with the caller's name for the model.

        An event is parsed only if something in it must change, since there is one for each token.
        """
        if self._calls_function:
            raw = with_function_call(raw)
        if b'"reasoning' in raw:
            raw = _with_both_reasonings(raw)
        if b'"logprob"' in raw:
            raw = with_shown_logprobs(raw)
            if self._alternatives is not None:
                raw = edit_each(raw, self._complete_logprobs)
        # Searched for once, and then only replaced.
        if not self._engines_name or self._engines_name not in raw:
            match = _MODEL.search(raw)
            if match is None:
                return raw
            self._engines_name = match[0]
        return raw.replace(self._engines_name, self._named, 1)

    def _complete_logprobs(self, choice: dict[str, Any]) -> None:
        """Add the field that OpenAI's schema requires, and remove unrequested alternatives.

        llama-server provides at least one.
        """
        choice["logprobs"].setdefault("refusal", None)
        for row in choice["logprobs"]["content"]:
            row["top_logprobs"] = row["top_logprobs"][: self._alternatives]

    def event(self, raw: bytes) -> bytes:
        """Return the event; empty for one with only the usage, if the caller does not want it."""
        if self._summed is not None and not (raw := self._summed.event(raw)):
            return b""
        # llama-server begins the answer to several prompts with a null, which is no valid chunk.
        if raw == b"null" or (not self._counted and b'"usage"' in raw and _is_usage(raw)):
            return b""
        return b"data: " + self._rewrite(raw) + b"\n\n"

    def finish(self, routing: Routing) -> bytes:
        """Return ``[DONE]``, preceded by the chunk with the summed usage, if there is one."""
        summed = self._summed.chunk() if self._summed is not None else b""
        usage = b"data: " + self._rewrite(summed) + b"\n\n" if summed else b""
        return usage + b"data: [DONE]\n\n"

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the whole answer, without the beginning that the caller sent."""
        raw = self._prefix.cut_from(raw) if routing.engine is Engine.LLAMA else raw
        return with_required(self._rewrite(raw))


def _with_both_reasonings(raw: bytes) -> bytes:
    """Return an event with its thinking under both names, ``reasoning_content`` and ``reasoning``."""

    def name(choice: dict[str, Any]) -> None:
        message = choice.get("delta") or choice.get("message") or {}
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]
        elif "reasoning" in message:
            message["reasoning_content"] = message["reasoning"]

    return edit_each(raw, name)


def with_function_call(raw: bytes) -> bytes:
    """Return a chunk or a whole answer with its first tool call as ``function_call``, without the others.

    The deprecated ``functions`` allow only one call, and clients expect it there.
    """

    def rename(choice: dict[str, Any]) -> None:
        message = choice.get("delta") or choice.get("message") or {}
        for position, call in enumerate(message.pop("tool_calls", None) or ()):
            if call.get("index", position) == 0:
                message["function_call"] = call["function"]
        if choice.get("finish_reason") == "tool_calls":
            choice["finish_reason"] = "function_call"

    return edit_each(raw, rename) if b'"tool_calls"' in raw else raw


def _is_usage(raw: bytes) -> bool:
    """Whether an event with a usage is the final one, which has no choices."""
    if b'"choices"' not in raw:
        return False
    try:
        return not msgspec.json.decode(raw, type=_Chunk).choices
    except UNDECODABLE:
        return False


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw]


def with_required(raw: bytes) -> bytes:
    """Return a whole answer with the fields that OpenAI's schema requires and engines omit."""

    def complete(choice: dict[str, Any]) -> None:
        choice.setdefault("logprobs", None)
        if "message" in choice:
            choice["message"].setdefault("refusal", None)
            choice["message"].setdefault("content", None)

    return edit_each(raw, complete)
