"""Assembles a non-streamed answer with several choices from the engine's stream.

llama-server reports the usage of each choice as it ends; its own non-streamed answer reports that of the
first only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.chunks import read_chunk
from sollold.api.engine.encoders import SseEncoder
from sollold.api.http.encoder import Encoder
from sollold.api.openai.sse import with_function_call, with_required
from sollold.errors import Fault, Refusal
from sollold.serving.request import Routing
from sollold.undecodable import UNDECODABLE

_OMITTED = ("choices", "usage", "timings", "object")
_REASONING = ("reasoning_content", "reasoning")


class GatheredChoices(SseEncoder):
    """`Encoder` that wraps the stream's encoder, and assembles its chunks into one answer."""

    def __init__(self, chunks: Encoder, *, calls_function: bool = False) -> None:
        """``calls_function``: whether the caller expects a ``function_call``, not ``tool_calls``."""
        self._chunks = chunks
        self._calls_function = calls_function
        self._head: dict[str, Any] = {}
        self._usage: Any = None
        self._choices: dict[int, _Choice] = {}

    def begin(self, routing: Routing) -> bytes:
        """Pass the chosen engine on to the wrapped encoder."""
        return self._chunks.begin(routing)

    def event(self, raw: bytes) -> bytes:
        """Collect the event's chunk; no bytes are sent.

        Raises:
            Refusal: ENGINE, if the event is an error or unreadable.
        """
        try:
            self._collect(self._chunks.event(raw))
        except (*UNDECODABLE, TypeError, AttributeError) as error:
            raise Refusal(Fault.ENGINE, f"unreadable response from the engine: {error}") from None
        return b""

    def finish(self, routing: Routing) -> bytes:
        """Collect the final chunk with the usage; no bytes are sent."""
        self._collect(self._chunks.finish(routing))
        return b""

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the answer; call it after `finish`."""
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        kind = "text_completion" if any("text" in choice for choice in choices) else "chat.completion"
        answer = {**self._head, "object": kind, "choices": choices}
        if self._usage is not None:
            answer["usage"] = self._usage
        encoded = msgspec.json.encode(answer)
        return with_required(with_function_call(encoded) if self._calls_function else encoded)

    def _collect(self, events: bytes) -> None:
        for line in events.split(b"\n\n"):
            if not line.startswith(b"data: {"):
                continue
            data = line.removeprefix(b"data: ")
            read_chunk(data)
            chunk = msgspec.json.decode(data)
            self._head = self._head or {key: value for key, value in chunk.items() if key not in _OMITTED}
            self._usage = chunk.get("usage") or self._usage
            for choice in chunk.get("choices") or ():
                index = choice.get("index", 0)
                self._choices.setdefault(index, _Choice(index)).add(choice)


class _Choice:
    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: dict[str, Any] = {}
        self._finish: str | None = None
        self._is_text = False

    def add(self, choice: dict[str, Any]) -> None:
        """Add a piece of the choice."""
        delta = choice.get("delta") or {}
        if "text" in choice:
            self._is_text, delta = True, {"content": choice["text"]}
        for name in ("content", *_REASONING):
            if delta.get(name):
                self._texts.setdefault(name, []).append(delta[name])
        for position, piece in enumerate(delta.get("tool_calls") or ()):
            self._add_call(piece, position)
        for name, values in (choice.get("logprobs") or {}).items():
            previous = self._logprobs.get(name)
            self._logprobs[name] = [*previous, *values] if previous and values else values or previous
        self._finish = choice.get("finish_reason") or self._finish

    def _add_call(self, piece: dict[str, Any], position: int) -> None:
        function = piece.get("function") or {}
        call = self._calls.setdefault(
            piece.get("index", position),
            {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
        )
        call["id"] = call["id"] or piece.get("id") or ""
        call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def whole(self) -> dict[str, Any]:
        """Return the choice in the form of a non-streamed answer."""
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        rest = {"logprobs": self._logprobs or None, "finish_reason": self._finish}
        if self._is_text:
            return {"index": self._index, "text": texts.get("content", ""), **rest}
        message: dict[str, Any] = {"role": "assistant", "content": texts.get("content", "")}
        message |= {name: texts[name] for name in _REASONING if name in texts}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
            message["content"] = message["content"] or None
        return {"index": self._index, "message": message, **rest}


def has_several_prompts(prompt: object) -> bool:
    """Whether a completion's prompt is a list of several prompts, not the tokens of one."""
    return isinstance(prompt, list) and len(prompt) > 1 and not all(type(token) is int for token in prompt)


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """Return a request for a stream with its usage: only a stream reports the usage of all choices."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}
