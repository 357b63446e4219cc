"""Encoders of server-sent events that several dialects share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec

from sollold.api.engine.chunks import Account, Chunk, Delta, Logprobs, ToolPiece, read_chunk
from sollold.api.http.errors import Dialect, refusal_bytes
from sollold.api.http.response import SSE
from sollold.api.http.routing_text import sse_comment
from sollold.errors import Refusal
from sollold.serving.request import Routing, Waiting

Event = dict[str, Any]


class SseEncoder:
    """Base of the `Encoder`s of server-sent events: no preamble, comments as keep-alives."""

    dialect = Dialect.OPENAI
    content_type = SSE

    finished = False
    """Only an encoder that looks for stop sequences itself finishes before its engine."""

    def begin(self, routing: Routing) -> bytes:
        """No bytes before the first event."""
        return b""

    def fail(self, refusal: Refusal) -> bytes:
        """Return the error as an event; nothing follows it."""
        return b"data: " + refusal_bytes(self.dialect, refusal) + b"\n\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Return a comment."""
        return sse_comment(waiting)


class PassThroughEncoder(SseEncoder):
    """`Encoder` of llama-server's own routes: passes events on undecoded, without ``[DONE]``."""

    def __init__(self, change: Callable[[bytes], bytes] | None, dialect: Dialect = Dialect.OPENAI) -> None:
        """``change`` is applied to a non-streamed answer; ``dialect``: of errors."""
        self._change = change
        self.dialect = dialect

    def event(self, raw: bytes) -> bytes:
        """The event, unchanged."""
        return b"data: " + raw + b"\n\n"

    def finish(self, routing: Routing) -> bytes:
        """No bytes after the last event."""
        return b""

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The answer, after ``change``."""
        return self._change(raw) if self._change is not None else raw


class EventTranslator(ABC):
    """Translates an engine's chunks into the named events of a dialect, for one answer."""

    def __init__(self) -> None:
        self._account = Account()
        self._logprobs: Logprobs | None = None
        """Log-probabilities of the choice being translated."""

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete although the engine has not finished."""
        return False

    @abstractmethod
    def start(self, routing: Routing) -> list[Event]:
        """Return the events before the first chunk."""

    @abstractmethod
    def keep_alive(self) -> list[Event]:
        """Return events without content: clients with a time limit on silence do not count comments."""

    def feed(self, raw: bytes) -> list[Event]:
        """Return the events for one chunk.

        Raises:
            Refusal: ENGINE if the chunk is an error or unreadable.
        """
        chunk = read_chunk(raw)
        self._account.feed(chunk)
        events = self._begin() if _has_content(chunk) else []
        for choice in chunk.choices:
            delta, self._logprobs = choice.delta or Delta(), choice.logprobs
            if choice.finish_reason:
                self._account.finish = choice.finish_reason
            if delta.thought:
                events += self._think(delta.thought)
            if delta.content:
                events += self._say(delta.content)
            for position, piece in enumerate(delta.tool_calls or ()):
                events += self._tool(piece, position)
        return events

    def _begin(self) -> list[Event]:
        """Return events to insert before those of a chunk that has content or counts."""
        return []

    @abstractmethod
    def _think(self, text: str) -> list[Event]:
        """Return the events for further thinking."""

    @abstractmethod
    def _say(self, text: str) -> list[Event]:
        """Return the events for further text."""

    @abstractmethod
    def _tool(self, piece: ToolPiece, position: int) -> list[Event]:
        """Return the events for a piece of a tool call."""

    @abstractmethod
    def last_events(self) -> list[Event]:
        """Return the events that end the answer."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> list[Event]:
        """Return the events of an error."""

    @abstractmethod
    def result(self) -> Event:
        """Return the whole answer; called after `last_events`."""


def _has_content(chunk: Chunk) -> bool:
    """Whether a chunk has more than the role, which llama-server sends first and without counts."""
    return chunk.timings is not None or any(choice.delta and choice.delta.says for choice in chunk.choices)


class EventEncoder(SseEncoder):
    """`Encoder` over an `EventTranslator`; each event's type is also in its ``event:`` line."""

    def __init__(self, events: EventTranslator, dialect: Dialect, last: bytes = b"") -> None:
        """``last``: bytes after the last event of a successful answer."""
        self.dialect = dialect
        self._events = events
        self._last = last

    def begin(self, routing: Routing) -> bytes:
        """The translator's first events."""
        return encode_events(self._events.start(routing))

    def event(self, raw: bytes) -> bytes:
        """The events for one chunk."""
        events = self._events.feed(raw)
        self.finished = self._events.stopped
        return encode_events(events)

    def finish(self, routing: Routing) -> bytes:
        """The events that end the answer."""
        return encode_events(self._events.last_events()) + self._last

    def fail(self, refusal: Refusal) -> bytes:
        """The events of the error."""
        return encode_events(self._events.fail(refusal))

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A comment, then the translator's events for this."""
        return super().keep_alive(waiting) + encode_events(self._events.keep_alive())

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The whole answer, after all its events."""
        return msgspec.json.encode(self._events.result())


def encode_events(events: list[Event]) -> bytes:
    """Encode ``events`` as named server-sent events."""
    return b"".join(
        [
            b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
            for event in events
        ]
    )
