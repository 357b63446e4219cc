"""Ollama's answers as NDJSON, one record a line. An Ollama's own lines pass on unread."""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from sollold.api.http.errors import Dialect, refusal_object, status_of
from sollold.api.http.response import JSON, NDJSON
from sollold.api.http.routing_text import routing_object, waiting_text
from sollold.errors import Fault, Refusal
from sollold.serving.request import Engine, Routing, Waiting


class Lines(Protocol):
    """A translator of events: `ChatLines` or `GenerateLines`."""

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """The records for one event."""
        ...

    def last_record(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The record with ``done``, its reason and the figures."""
        ...

    def whole(self, raw: bytes, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The one record of an answer that is not streamed."""
        ...

    def empty(self) -> dict[str, Any]:
        """A record that says nothing and is not the last: clients add nothing to nothing."""
        ...


class LineEncoder:
    """`Encoder` of chat and generate."""

    dialect = Dialect.OLLAMA
    content_type = NDJSON
    finished = False

    def __init__(self, lines: Lines, started: float) -> None:
        self._lines = lines
        self._started = started
        self._engine = Engine.LLAMA
        self._routing: Routing | None = None
        self._ended = False

    def begin(self, routing: Routing) -> bytes:
        """Nothing; but the engine is known now."""
        self._engine = routing.engine
        self._routing = routing
        return b""

    def event(self, raw: bytes) -> bytes:
        """The lines for one event."""
        if self._engine is Engine.OLLAMA:
            if b'"done":true' in raw and self._routing is not None:
                return self._last(raw, self._routing)
            return raw + b"\n"
        return b"".join([msgspec.json.encode(record) + b"\n" for record in self._lines.feed(raw)])

    def _last(self, raw: bytes, routing: Routing) -> bytes:
        record = msgspec.json.decode(raw)
        if record.get("done") is True:
            self._ended = True
            record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record) + b"\n"

    def finish(self, routing: Routing) -> bytes:
        """The last line."""
        if self._engine is Engine.OLLAMA:
            if self._ended:
                return b""
            return self.fail(Refusal(Fault.INTERRUPTED, "Ollama ended its answer without its last record"))
        record = self._lines.last_record(routing, time.monotonic() - self._started)
        record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record) + b"\n"

    def fail(self, refusal: Refusal) -> bytes:
        """The error as a line; ``code`` is the status that it would have had."""
        told = {**refusal_object(Dialect.OLLAMA, refusal), "code": status_of(refusal)}
        return msgspec.json.encode(told) + b"\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A record without content. A blank line or a comment would break clients that parse each line."""
        return msgspec.json.encode({**self._lines.empty(), "_waiting": waiting_text(waiting)}) + b"\n"

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The one record of an answer that is not streamed."""
        if routing.engine is Engine.OLLAMA:
            record = msgspec.json.decode(raw)
        else:
            record = self._lines.whole(raw, routing, time.monotonic() - self._started)
        record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record)


class LoadLines:
    """`Lines` of a request that only loads or unloads: there are no events."""

    def __init__(self, empty: dict[str, Any], reason: str) -> None:
        self._empty = empty
        self._reason = reason

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Nothing: what an engine may have said to it is not an answer."""
        return []

    def last_record(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The one record: it is done, and why."""
        return {**self._empty, "done": True, "done_reason": self._reason}

    def whole(self, raw: bytes, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The same, for a caller that does not stream."""
        return self.last_record(routing, total_seconds)

    def empty(self) -> dict[str, Any]:
        """A record that says nothing, while it loads."""
        return self._empty


class LoadEncoder(LineEncoder):
    """`Encoder` of a request that only loads: one JSON object, after white space while it is waited for."""

    content_type = JSON

    def keep_alive(self, waiting: Waiting) -> bytes:
        """White space, which JSON allows before the object."""
        return b"\n"

    def begin(self, routing: Routing) -> bytes:
        """Nothing, and whatever the engine is, the record is ours."""
        return b""

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The only record."""
        return self.finish(routing).rstrip(b"\n")
