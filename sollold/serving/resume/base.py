"""Records the delivered part of a stream, requests the rest, and adapts the new events to the old stream.

Pure. While all goes well, a `Continuation` collects the engine's events as raw JSON without parsing them, and
only now and then folds them into text, so that a long answer does not use much memory. After a fault `resume`
returns the request that makes another engine continue where the stream stopped: it gets the delivered part as
the beginning of its own answer (prefill). `merge` turns that engine's events into ones that continue the old
stream: same id, no second role, counts and times of the whole.

Nothing is lost or duplicated: an engine sends only whole characters, and holds back text that might begin a
stop string; such text was not delivered and is generated again. If the rest of an answer depends on more than
its text, `check` reports that it can't be continued exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec
from msgspec.structs import replace

from sollold.serving.request import Call, Delivered, Engine
from sollold.undecodable import UNDECODABLE

_MAX_UNREAD = 512
"""Maximum number of events kept unparsed."""

JsonObject = dict[str, Any]


class NotResumable(Exception):
    """The stream can't be continued exactly; the message says why."""


class Continuation(ABC):
    """The delivered part of one stream."""

    def __init__(self, call: Call) -> None:
        self.call = call
        """The original request."""
        self.resumed = False
        """Whether events must now pass through `merge`."""
        self.delivered = False
        """Whether anything has been delivered to the caller."""
        self.events = 0
        """Number of events with text so far: an estimate of tokens if the engine can't count them."""
        self.tokens = 0
        """Number of tokens delivered before the last fault."""
        self.exhausted = False
        """Whether no more tokens may be generated: the new engine provides only the end of the stream."""
        self.spent_ms = 0.0
        """Time that failed engines spent generating, in milliseconds; added by the reader of the streams."""
        self._unread: list[bytes] = []
        self._content: list[str] = []
        self._thinking: list[str] = []
        self._tool_call = False
        self._finished = False
        """Whether the text is complete, so that only counts can be missing."""

    @property
    def text(self) -> str:
        """The delivered text that engines generated, thinking first, for counting its tokens."""
        self.fold()
        return "".join(self._thinking) + "".join(self._content)

    @property
    def has_tool_call(self) -> bool:
        """Whether a tool call was delivered, or a part of one."""
        self.fold()
        return self._tool_call

    def add_events(self, events: list[bytes]) -> None:
        """Record events that are delivered to the caller unchanged."""
        self._unread += events
        self.delivered = True
        if len(self._unread) >= _MAX_UNREAD:
            self.fold()

    def restore(self, delivered: Delivered) -> None:
        """Start from the part that another node delivered; to be called before any events are added."""
        self.delivered = True
        self.events = delivered.events
        self.spent_ms = delivered.spent_ms
        self._restore(delivered)

    def fold(self) -> None:
        """Parse the events kept unparsed."""
        events, self._unread = self._unread, []
        for raw in events:
            event = read(raw)
            if event is not None:
                self._read(event)

    def resume(self, tokens: int | None) -> Call:
        """Return the request that continues the stream. From now on events must pass through `merge`.

        ``tokens``: number of tokens delivered; None if the engine could not count them.
        """
        self.fold()
        self.tokens = self.events if tokens is None else tokens
        self.resumed = True
        return self._continuation()

    def forbid_tool_calls(self) -> None:
        """Have the rest generated as text, since the model's tool call can't be parsed."""
        self.call = replace(self.call, body={**self.call.body, "tool_choice": "none"})

    def closing(self) -> list[bytes]:
        """The last events, if only they are missing and no engine is needed for them; otherwise empty."""
        return []

    def cut_short(self) -> list[bytes]:
        """The last events of an answer that Ollama ended without them, as when the answer repeats itself."""
        return []

    def merge(self, raw: bytes) -> list[bytes]:
        """Turn an event of the new engine into the events that continue the old stream."""
        event = read(raw)
        if event is None:
            return []
        merged = self._merge(event)
        if merged is None:
            return []
        # Its counts already cover the whole answer; record it for the next fault.
        self._read(merged)
        self.delivered = True
        return [msgspec.json.encode(merged)]

    def measure(self) -> tuple[Call, Call] | None:
        """Two requests whose prompts differ by the delivered part, if that is more than `text`; else None."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Check that the stream can be continued exactly.

        Raises:
            NotResumable: it can't.
        """

    @abstractmethod
    def _read(self, event: JsonObject) -> None:
        """Record the content of a delivered event."""

    def _add(self, content: str | None, thinking: str | None = None, tool_calls: object = None) -> None:
        """Record the content of a piece of the answer."""
        if content:
            self._content.append(content)
        if thinking:
            self._thinking.append(thinking)
        self.events += bool(content or thinking)
        self._tool_call = self._tool_call or bool(tool_calls)

    def _joined(self) -> tuple[str, str]:
        """Return the content and the thinking so far."""
        self._content, self._thinking = ["".join(self._content)], ["".join(self._thinking)]
        return self._content[0], self._thinking[0]

    def _restore(self, delivered: Delivered) -> None:
        self._content, self._thinking = [delivered.content], [delivered.thinking]
        self._tool_call = delivered.tool_calls

    @abstractmethod
    def _continuation(self) -> Call: ...

    @abstractmethod
    def _merge(self, event: JsonObject) -> JsonObject | None: ...


class ChunkContinuation(Continuation):
    """Base for streams of OpenAI's chunks, from llama-server or Ollama."""

    def __init__(self, call: Call, engine: Engine) -> None:
        super().__init__(call)
        self._engine = engine
        self._names: JsonObject | None = None
        """Fields that all chunks have in common."""
        self._usage = False
        """Whether the usage was delivered."""

    def _note(self, event: JsonObject) -> None:
        """Record what a delivered chunk has besides its choices."""
        if self._names is None:
            self._names = {key: event[key] for key in ("id", "created", "model") if key in event}
        self._usage = self._usage or bool(event.get("usage"))

    def _correct(self, event: JsonObject) -> list[JsonObject]:
        """Set names, counts and times of the whole answer in a chunk; return its choices."""
        event |= {key: value for key, value in (self._names or {}).items() if key in event}
        total_usage(event.get("usage"), self.tokens, self.exhausted)
        total_timings(event.get("timings"), self.tokens, self.spent_ms, self.exhausted)
        return event.get("choices") or []

    def _limit(self, body: JsonObject, name: str) -> None:
        """Limit ``body`` to the tokens that are left; ``name``: the limit's name for this engine."""
        if self._finished:
            # Only the counts may be missing, for which the prompt is processed.
            body[name] = 1
            self.exhausted = True
        else:
            self.exhausted = reduce_limits(body, LIMITS, self.tokens)

    def _last_chunk(self, kind: str, **choice: Any) -> list[bytes]:
        choices = [{"index": 0, **choice, "finish_reason": "stop"}]
        return [msgspec.json.encode({"object": kind, **(self._names or {}), "choices": choices})]


def read(raw: bytes) -> JsonObject | None:
    """Parse an event; None if it is not a JSON object."""
    try:
        event = msgspec.json.decode(raw)
    except UNDECODABLE:
        return None
    return event if isinstance(event, dict) else None


LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
"""Names of the limit on tokens in llama-server's and OpenAI's APIs."""


def reduce_limits(body: JsonObject, keys: tuple[str, ...], made: int) -> bool:
    """Reduce the limit on tokens, under each of its names in ``keys``, by the tokens already generated.

    Returns whether nothing is left. The limit is then 1, since an engine generates at least one token.
    """
    exhausted = False
    for key in keys:
        limit = body.get(key)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
            exhausted = exhausted or limit <= made
            body[key] = max(1, limit - made)
    return exhausted


def asked_for(body: JsonObject, key: str) -> bool:
    """Whether an option is present, and not false, zero or empty."""
    return bool(body.get(key))


def total_usage(usage: Any, tokens: int, exhausted: bool) -> None:
    """Correct a continuation's usage to the whole answer's: delivered tokens are completion, not prompt."""
    if not isinstance(usage, dict):
        return
    prompt, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int) and isinstance(generated, int):
        usage["prompt_tokens"] = max(0, prompt - tokens)
        usage["completion_tokens"] = tokens if exhausted else generated + tokens
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        details["cached_tokens"] = min(details["cached_tokens"], usage.get("prompt_tokens", 0))


def total_timings(timings: Any, tokens: int, spent_ms: float, exhausted: bool) -> None:
    """Correct llama-server's ``timings`` in the same way."""
    if not isinstance(timings, dict):
        return
    if isinstance(timings.get("predicted_n"), int):
        fresh_n, fresh_ms = timings["predicted_n"], float(timings.get("predicted_ms") or 0.0)
        generated = timings["predicted_n"] = tokens if exhausted else tokens + fresh_n
        spent = timings["predicted_ms"] = spent_ms if exhausted else spent_ms + fresh_ms
        timings["predicted_per_token_ms"] = spent / generated if generated else 0.0
        timings["predicted_per_second"] = generated * 1000 / spent if spent else 0.0
    if isinstance(timings.get("prompt_n"), int):
        cached = timings.get("cache_n") if isinstance(timings.get("cache_n"), int) else 0
        processed = timings["prompt_n"]
        timings["prompt_n"] = max(0, processed - tokens)
        timings["cache_n"] = max(0, (cached or 0) - max(0, tokens - processed))
