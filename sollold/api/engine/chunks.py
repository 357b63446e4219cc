"""Decodes engines' events: text, reasoning, tool calls, log-probabilities, usage."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from sollold.errors import Fault, Refusal
from sollold.serving.request import Routing
from sollold.undecodable import UNDECODABLE


class Timings(msgspec.Struct):
    """llama-server's own statistics of an answer, in milliseconds and tokens."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Usage(msgspec.Struct):
    """Token counts of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ToolFunction(msgspec.Struct):
    """The function in a piece of a call: the name comes first, the arguments in fragments."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class ToolPiece(msgspec.Struct):
    """A piece of a tool call in a chunk, or a whole call in a message."""

    index: int | None = None
    id: str | None = None
    function: ToolFunction | None = None

    def number(self, position: int) -> int:
        """Return the index of its call; ``position``, that in the event, if the engine gives none."""
        return self.index if self.index is not None else position

    @property
    def name(self) -> str:
        """The function's name; empty after a call's first piece."""
        return (self.function.name if self.function is not None else None) or ""

    @property
    def arguments(self) -> str:
        """The next fragment of the arguments' JSON."""
        arguments = self.function.arguments if self.function is not None else None
        if isinstance(arguments, dict):
            return msgspec.json.encode(arguments).decode()
        return arguments or ""


class Delta(msgspec.Struct):
    """``delta`` of a chunk, ``message`` of a whole answer."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolPiece] | None = None

    @property
    def says(self) -> bool:
        """Whether it has text, reasoning or tool calls."""
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)

    @property
    def thought(self) -> str:
        """The reasoning, under either engine's name for it."""
        return self.reasoning_content or self.reasoning or ""


IMPOSSIBLE = -9999.0
"""OpenAI's documented log-probability of a token that is not among the most likely ones. For one that is
impossible, such as a forbidden one, llama.cpp gives the lowest number that a float can hold."""
_LOWEST = re.compile(rb'("logprob"\s*:\s*)-\d+(?:\.\d+)?[eE]\+?\d+')
"""A log-probability in exponent notation. Within a JSON string, the quotes would be escaped."""


def with_shown_logprobs(raw: bytes) -> bytes:
    """Return an event or a whole answer with `IMPOSSIBLE` for impossible tokens, without decoding it."""
    return _LOWEST.sub(rb"\g<1>%.1f" % IMPOSSIBLE, raw) if b'"logprob"' in raw else raw


class TokenLogprob(msgspec.Struct):
    """One token and its alternatives."""

    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] = []

    def __post_init__(self) -> None:
        self.logprob = max(self.logprob, IMPOSSIBLE)


class Logprobs(msgspec.Struct):
    """``logprobs`` of a choice."""

    content: list[TokenLogprob] | None = None


def logprob_objects(logprobs: Logprobs | None, top: int) -> list[dict[str, Any]]:
    """Return an event's ``logprobs`` as Ollama and OpenAI show them, with at most ``top`` alternatives."""
    if logprobs is None or not logprobs.content:
        return []
    entries = []
    for token in logprobs.content:
        entry: dict[str, Any] = {"token": token.token, "logprob": token.logprob, "bytes": token.bytes or []}
        if top:
            entry["top_logprobs"] = [
                {"token": alternative.token, "logprob": alternative.logprob, "bytes": alternative.bytes or []}
                for alternative in token.top_logprobs[:top]
            ]
        entries.append(entry)
    return entries


class Choice(msgspec.Struct):
    """One choice of a chunk or of a whole answer."""

    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """The part of an engine's event that the dialects read; the rest is skipped by the decoder."""

    choices: list[Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: Any = None


T = TypeVar("T")


def decoded(raw: bytes, decoder: msgspec.json.Decoder[T], what: str = "response from the engine") -> T:
    """Decode what an engine sent; ``what`` names it in the error.

    Raises:
        Refusal: ENGINE if it can't be read.
    """
    try:
        return decoder.decode(raw)
    except UNDECODABLE as error:
        raise Refusal(Fault.ENGINE, f"unreadable {what}: {error}") from None


_chunk = msgspec.json.Decoder(Chunk)


def read_chunk(raw: bytes) -> Chunk:
    """Decode an engine's event.

    Raises:
        Refusal: ENGINE, when the event is an error or can't be read.
    """
    chunk = decoded(raw, _chunk)
    if chunk.error is not None:
        message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
        raise Refusal(Fault.ENGINE, f"engine error: {message}")
    return chunk


class Infilled(msgspec.Struct):
    """One event of ``/infill``."""

    content: str = ""
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[TokenLogprob] = []

    @property
    def finish(self) -> str:
        """OpenAI's ``finish_reason``; empty before the end."""
        if not self.stop and not self.stop_type:
            return ""
        return "length" if self.stop_type == "limit" else "stop"

    @property
    def logprobs(self) -> Logprobs | None:
        """Log-probabilities in the form of the other routes."""
        return Logprobs(self.completion_probabilities) if self.completion_probabilities else None


_infilled = msgspec.json.Decoder(Infilled)


def read_infilled(raw: bytes) -> Infilled:
    """Decode an event of ``/infill``.

    Raises:
        Refusal: ENGINE if the event is an error or can't be read.
    """
    read_chunk(raw)
    return decoded(raw, _infilled)


def edit_each(raw: bytes, edit: Callable[[dict[str, Any]], object], field: str = "choices") -> bytes:
    """Return an event or a whole answer after ``edit`` has changed each entry of its list ``field``.

    Unchanged if it is not of the expected form.
    """
    try:
        answer = msgspec.json.decode(raw)
        for entry in answer[field]:
            edit(entry)
    except (*UNDECODABLE, LookupError, TypeError, AttributeError):
        return raw
    return msgspec.json.encode(answer)


def object_of(text: str) -> dict[str, Any]:
    """Return a call's arguments as an object, which clients require; any other value becomes its member.

    Raises:
        UNDECODABLE: the arguments were cut off.
    """
    try:
        arguments = msgspec.json.decode(text or "{}")
    except UNDECODABLE:
        # A number beyond the range of a double, which is valid JSON: the values are passed on undecoded.
        arguments = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    if isinstance(arguments, dict):
        return arguments
    return {} if arguments is None else {"arguments": arguments}


class ToolCalls:
    """Assembles tool calls from their pieces; one is complete when the next begins."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        self._given = 0

    def feed(self, pieces: list[ToolPiece] | None) -> None:
        """Add the pieces of one event."""
        for position, piece in enumerate(pieces or ()):
            index = piece.number(position)
            name, id_, parts = self._calls.get(index, ("", "", []))
            parts.append(piece.arguments)
            self._calls[index] = (name or piece.name, id_ or piece.id or "", parts)

    def completed(self, *, finished: bool) -> list[dict[str, Any]]:
        """Return the calls completed since the last time, in Ollama's form.

        A call cut off in the middle of its arguments (by the token limit) is left out.
        """
        out = []
        indexes = sorted(self._calls)
        ready = indexes if finished else indexes[:-1]
        for index in ready[self._given :]:
            self._given += 1
            name, id_, parts = self._calls[index]
            try:
                arguments = object_of("".join(parts))
            except UNDECODABLE:
                continue
            function = {"index": index, "name": name, "arguments": arguments}
            out.append({"id": id_, "function": function} if id_ else {"function": function})
        return out


class Account:
    """Collects an answer's token counts and times from its events."""

    def __init__(self) -> None:
        self.finish = ""
        self.usage = Usage()
        self.timings = Timings()
        self._pieces = self._thoughts = 0

    def feed(self, chunk: Chunk) -> None:
        """Add the counts and times of an event."""
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.timings is not None:
            self.timings = chunk.timings
        deltas = [choice.delta for choice in chunk.choices if choice.delta is not None]
        self._pieces += sum(delta.says for delta in deltas)
        self._thoughts += sum(bool(delta.thought) for delta in deltas)

    @property
    def tokens(self) -> int:
        """Tokens of the answer; the number of pieces so far until the engine reports a count."""
        return self.usage.completion_tokens or self.timings.predicted_n or self._pieces

    @property
    def thought_tokens(self) -> int:
        """Tokens of thinking: the number of its pieces, since engines report no count."""
        return min(self._thoughts, self.tokens)

    def final(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """Return the counts and durations, in nanoseconds, of Ollama's last record."""
        timings, usage = self.timings, self.usage
        return {
            "done": True,
            "done_reason": done_reason(self.finish),
            "total_duration": int(total_seconds * 1e9),
            "load_duration": int(routing.load_ms * 1e6),
            "prompt_eval_count": usage.prompt_tokens or timings.prompt_n + timings.cache_n,
            "prompt_eval_duration": int(timings.prompt_ms * 1e6),
            "eval_count": self.tokens,
            "eval_duration": int(timings.predicted_ms * 1e6),
        }


def done_reason(finish: str) -> str:
    """Return Ollama's ``done_reason`` for OpenAI's ``finish_reason``."""
    return "length" if finish == "length" else "stop"
