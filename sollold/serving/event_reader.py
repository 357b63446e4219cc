"""Turns an attempt's body into events for the caller: splits it, renames the model, records delivery."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from sollold.serving.attempts import Attempt
from sollold.serving.request import Call, Engine
from sollold.serving.resume.base import Continuation
from sollold.serving.resume.base import read as read_event

_ERROR = b'{"error"'
"""Beginning of an event by which an engine reports an error."""
_NATIVE = ("/completion", "/infill")
"""Paths with events in llama-server's own format."""


class EventSplitter:
    """Splits an engine's body into events, and detects whether it is complete."""

    def __init__(self, engine: Engine, path: str) -> None:
        self._lines = engine is Engine.OLLAMA and path.startswith("/api/")
        self._done_word = _done_word(path)
        self._rest = b""
        self._last = b""
        self.done = False
        """Whether the engine's end marker has been seen; final after `finish`."""

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes and return the complete events: payloads of ``data:`` lines, or lines."""
        if self._rest:
            data = self._rest + data
        if self._lines:
            return self._cut_lines(data)
        if data.startswith(b"data: ") and data.find(b"\n\n") == len(data) - 2:
            # A single event, the usual case.
            payload, self._rest = data[6:-2], b""
            if payload == b"[DONE]":
                self.done = True
                return []
            self._last = payload
            return [payload]
        parts = data.split(b"\n\n")
        self._rest = parts.pop()
        events = []
        for part in parts:
            if part.startswith(b"data: "):
                payload = part[6:]
            else:
                start = part.find(b"data:")
                if start < 0 or (start and part[start - 1] != 10):
                    continue
                payload = part[start + 5 :].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                events.append(payload)
        if events:
            self._last = events[-1]
        return events

    def _cut_lines(self, data: bytes) -> list[bytes]:
        events = data.split(b"\n")
        self._rest = events.pop()
        events = [event for event in events if event]
        if events:
            self._last = events[-1]
        return events

    @property
    def over(self) -> bool:
        """Whether the engine has announced the end, however the body ended."""
        if self._lines:
            # A search for the word is not enough: it may occur in a tool call's arguments.
            last = read_event(self._last)
            return last is not None and last.get("done") is True
        return self.done or any(word in self._last for word in self._done_word)

    def finish(self) -> list[bytes]:
        """End the body: return a last event without a line end, if any, and set `done` finally."""
        events: list[bytes] = []
        if self._rest.strip():
            events = self.feed(b"\n" if self._lines else b"\n\n")
        self.done = self.over
        return events


def _done_word(path: str) -> tuple[bytes, ...]:
    """Strings that mark the last event of a stream that does not end with ``[DONE]``."""
    if path.startswith("/v1/messages"):
        return (b'"message_stop"',)
    if path.startswith("/v1/responses"):
        return (b'"response.completed"', b'"response.failed"', b'"response.incomplete"')
    if path.startswith(_NATIVE):
        return (b'"stop":true',)
    return ()


def _leaves_out_end(call: Call) -> bool:
    """Whether the last event lacks its mark because the caller has chosen its fields; the others have all."""
    fields = call.body.get("response_fields")
    chosen = isinstance(fields, list) and bool(fields) and "stop" not in fields
    return chosen and call.path.startswith(_NATIVE)


def callers_name(attempt: Attempt) -> Callable[[bytes], bytes] | None:
    """Return a function that replaces an Ollama's name for the model in an event by the requested one.

    They differ for an alias, a name without tag or host, or the same content under another name. None if
    there is nothing to replace, so that it costs nothing per token.
    """
    if attempt.candidate.engine is not Engine.OLLAMA:
        return None
    requested, engine_name = attempt.call.body.get("model"), attempt.candidate.endpoint.model
    if not isinstance(requested, str) or not requested or requested == engine_name:
        return None
    # In every event the field precedes the model's text; inside a string its quotes would be escaped.
    field = re.compile(rb'("model"\s*:\s*)' + re.escape(msgspec.json.encode(engine_name)))
    replacement = msgspec.json.encode(requested)
    return lambda event: field.sub(lambda match: match[1] + replacement, event, count=1)


class EventReader:
    """Turns one attempt's body into the events for the caller."""

    def __init__(self, attempt: Attempt, continuation: Continuation) -> None:
        self._events = EventSplitter(attempt.candidate.engine, attempt.call.path)
        self._rename = callers_name(attempt)
        self._unmarked = _leaves_out_end(attempt.call)
        self._continuation = continuation
        self.started = False
        """Whether the engine has sent an event other than an error."""
        self.began = 0.0
        """When that was first noticed, on the loop's clock; set by the owner."""
        self.delivered = False
        """Whether there were any events for the caller from this attempt."""
        self.whole = False
        """Whether the body ended with the engine's end marker; set by `finish`."""
        self.error = b""
        """The event by which the engine reported an error; empty if none."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add received bytes and return the complete events up to an error, which is stored in `error`."""
        return self._to_caller(self._events.feed(chunk))

    def finish(self) -> list[bytes]:
        """End the body and return the last events."""
        events = self._to_caller(self._events.finish())
        self.whole = self._events.done or self._unmarked
        return events

    @property
    def over(self) -> bool:
        """Whether the engine has announced the end, however the body ended."""
        return self._events.over

    def _to_caller(self, events: list[bytes]) -> list[bytes]:
        for index, event in enumerate(events):
            if event.startswith(_ERROR):
                self.error = event
                events = events[:index]
                break
        if not events:
            return events
        self.started = True
        if self._rename:
            events = [self._rename(event) for event in events]
        continuation = self._continuation
        if continuation.resumed:
            events = [merged for event in events for merged in continuation.merge(event)]
        else:
            # The path of nearly every token: nothing is parsed or copied.
            continuation.add_events(events)
        if events:
            self.delivered = True
        return events
