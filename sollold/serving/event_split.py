"""A stream of bytes, cut into whole events."""

from __future__ import annotations

from io import BytesIO

from sollold.serving.local_stream import Stream
from sollold.serving.protocol import (
    ErrorKind,
    StreamError,
)
from sollold.serving.request import Engine
from sollold.serving.resume.base import read as read_event


class EventSplitter:
    """Cuts an engine's body into events, and knows whether its end was the end."""

    def __init__(self, engine: Engine, path: str) -> None:
        self._lines = engine is Engine.OLLAMA and path.startswith("/api/")
        self._done_word = _done_word(path)
        self._rest = b""
        self._last = b""
        self.done = False
        """Whether the body has come to the end that the engine announces."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now: payloads of ``data:`` lines, or lines."""
        if self._rest:
            data = self._rest + data
        if self._lines:
            return self._cut_lines(data)
        if data.startswith(b"data: ") and data.find(b"\n\n") == len(data) - 2:
            # One event alone, as nearly all come.
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
                at = part.find(b"data:")
                if at < 0 or (at and part[at - 1] != 10):
                    continue
                payload = part[at + 5 :].strip()
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
        """Whether the engine has said that there is no more, however the body ended."""
        if self._lines:
            # The word may stand in a tool call's arguments, too.
            last = read_event(self._last)
            return last is not None and last.get("done") is True
        return self.done or any(word in self._last for word in self._done_word)

    def finish(self) -> list[bytes]:
        """The body has ended: an event whose end-of-line was left out, and `done` gets its last word."""
        events: list[bytes] = []
        if self._rest.strip():
            events = self.feed(b"\n" if self._lines else b"\n\n")
        self.done = self.over
        return events


def _done_word(path: str) -> tuple[bytes, ...]:
    """What the last of an event stream's events contains, where it does not end with ``[DONE]``."""
    if path.startswith("/v1/messages"):
        return (b'"message_stop"',)
    if path.startswith("/v1/responses"):
        return (b'"response.completed"', b'"response.failed"', b'"response.incomplete"')
    if path.startswith(("/completion", "/infill")):
        return (b'"stop":true',)
    return ()


async def whole(stream: Stream, limit: int = 256 * 1024 * 1024) -> bytes:
    """The whole body.

    Raises:
        StreamError: it broke off, or is longer than ``limit`` bytes.
    """
    # Grows in place and gives what it holds without a copy, which of a long one would stop the loop.
    body = BytesIO()

    def receive(chunk: bytes) -> bool:
        if body.tell() + len(chunk) > limit:
            raise StreamError(ErrorKind.ENGINE, f"the answer is longer than {limit} bytes")
        body.write(chunk)
        return True

    await stream.pour(receive)
    return body.getvalue()
