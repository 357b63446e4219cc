"""Encoders of server-sent events that several dialects share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec

from sollold.api.engine.chunks import Account, Chunk, Delta, Logprobs, ToolPiece, read_chunk
from sollold.api.http.errors import Dialect, refusal_bytes
from sollold.api.http.response import SSE
from sollold.api.http.routing_text import waiting_text
from sollold.errors import Refusal
from sollold.serving.request import Routing, Waiting

Event = dict[str, Any]


class SseEncoder:
    """Base of the `Encoder`s of server-sent events: no preamble, comments as a sign of life."""

    dialect = Dialect.OPENAI
    content_type = SSE

    finished = False
    """Only an encoder that looks for stop sequences itself ends before its engine."""

    def begin(self, routing: Routing) -> bytes:
        """No bytes before the first event."""
        return b""

    def fail(self, refusal: Refusal) -> bytes:
        """The error as an event; nothing follows."""
        return b"data: " + refusal_bytes(self.dialect, refusal) + b"\n\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A comment, which every client of server-sent events skips."""
        return b": " + waiting_text(waiting).encode("ascii") + b"\n\n"


class PassThroughEncoder(SseEncoder):
    """`Encoder` of llama-server's own routes: events pass on unread, without ``[DONE]``."""

    def __init__(self, change: Callable[[bytes], bytes] | None) -> None:
        """``change`` is applied to a whole answer."""
        self._change = change

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
    """Turns an engine's chunks into the named events of a dialect, for one answer."""

    def __init__(self) -> None:
        self._account = Account()
        self._logprobs: Logprobs | None = None
        """Of the event that is read."""

    @property
    def stopped(self) -> bool:
        """The answer is whole though the engine has not ended."""
        return False

    @abstractmethod
    def start(self, routing: Routing) -> list[Event]:
        """The events before the first chunk."""

    def feed(self, raw: bytes) -> list[Event]:
        """The events for one chunk.

        Raises:
            Refusal: ENGINE, when the chunk is an error.
        """
        chunk = read_chunk(raw)
        self._account.feed(chunk)
        events = self._begin() if _tells(chunk) else []
        for choice in chunk.choices:
            said, self._logprobs = choice.delta or Delta(), choice.logprobs
            if choice.finish_reason:
                self._account.finish = choice.finish_reason
            if said.thought:
                events += self._think(said.thought)
            if said.content:
                events += self._say(said.content)
            for place, piece in enumerate(said.tool_calls or ()):
                events += self._tool(piece, place)
        return events

    def _begin(self) -> list[Event]:
        """The events before those of the first chunk that says something, and how long the prompt was."""
        return []

    @abstractmethod
    def _think(self, text: str) -> list[Event]:
        """More of the thinking."""

    @abstractmethod
    def _say(self, text: str) -> list[Event]:
        """More of the text."""

    @abstractmethod
    def _tool(self, piece: ToolPiece, place: int) -> list[Event]:
        """More of a tool call."""

    @abstractmethod
    def last_events(self) -> list[Event]:
        """The events that end the answer."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> list[Event]:
        """The events of an error."""

    @abstractmethod
    def result(self) -> Event:
        """The whole answer, after `last_events`."""


def _tells(chunk: Chunk) -> bool:
    """Whether a chunk has more in it than the role, which llama-server sends first and without its counts."""
    return chunk.timings is not None or any(choice.delta and choice.delta.says for choice in chunk.choices)


class EventEncoder(SseEncoder):
    """`Encoder` over an `EventTranslator`: each event has its type in an ``event:`` line too."""

    def __init__(self, events: EventTranslator, dialect: Dialect, last: bytes = b"") -> None:
        """``last``: bytes after the last event of a good answer."""
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

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The whole answer, after all its events."""
        return msgspec.json.encode(self._events.result())


def encode_events(events: list[Event]) -> bytes:
    """Named server-sent events."""
    return b"".join(
        [
            b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
            for event in events
        ]
    )
