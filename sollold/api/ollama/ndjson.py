"""Ollama's answers as NDJSON, one record per line. An Ollama's own lines but the last pass through unread."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from sollold.api.engine.chunks import Account, decoded
from sollold.api.http.errors import Dialect, refusal_object, status_of
from sollold.api.http.response import JSON, NDJSON
from sollold.api.http.routing_text import routing_object, waiting_text
from sollold.errors import Fault, Refusal
from sollold.serving.request import Engine, Routing, Waiting
from sollold.units import timestamp_text


class Lines(ABC):
    """Translates the events of one answer into Ollama's records."""

    def __init__(self, model: str, top_logprobs: int = 0) -> None:
        self._model = model
        self._top = top_logprobs
        self._account = Account()

    @abstractmethod
    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Return the records for one event: usually one, none for an event without content.

        Raises:
            Refusal: ENGINE, if the event is an error.
        """

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """Return a record without content that is not the last: clients append nothing."""

    def last_record(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """Return the record with ``done``, its reason and the statistics."""
        return {**self.empty(), **self._closing(routing, total_seconds)}

    def whole(self, raw: bytes, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """Return the only record of an answer that is not streamed."""
        records = self.feed(raw) or [self.empty()]
        return {**records[0], **self._closing(routing, total_seconds)}

    def _closing(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        return self._account.final(routing, total_seconds)

    def _record(self, **content: Any) -> dict[str, Any]:
        created = timestamp_text(time.time())
        return {"model": self._model, "created_at": created, **content, "done": False}


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
        """Remember the engine; no bytes are sent."""
        self._engine = routing.engine
        self._routing = routing
        return b""

    def event(self, raw: bytes) -> bytes:
        """Return the lines for one event."""
        if self._engine is Engine.OLLAMA:
            if b'"done":true' in raw and self._routing is not None:
                return self._last(raw, self._routing)
            return raw + b"\n"
        return b"".join([msgspec.json.encode(record) + b"\n" for record in self._lines.feed(raw)])

    def _last(self, raw: bytes, routing: Routing) -> bytes:
        record = decoded(raw, _record, "response from Ollama")
        if record.get("done") is True:
            self._ended = True
            record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record) + b"\n"

    def finish(self, routing: Routing) -> bytes:
        """Return the last line."""
        if self._engine is Engine.OLLAMA:
            if self._ended:
                return b""
            return self.fail(Refusal(Fault.INTERRUPTED, "Ollama ended its answer without its last record"))
        record = self._lines.last_record(routing, time.monotonic() - self._started)
        record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record) + b"\n"

    def fail(self, refusal: Refusal) -> bytes:
        """Return the error as a line; ``code`` is the HTTP status that it would have had."""
        record = {**refusal_object(Dialect.OLLAMA, refusal), "code": status_of(refusal)}
        return msgspec.json.encode(record) + b"\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Return a record without content: a blank line would break clients that parse each line."""
        return msgspec.json.encode({**self._lines.empty(), "_waiting": waiting_text(waiting)}) + b"\n"

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the only record of an answer that is not streamed."""
        if routing.engine is Engine.OLLAMA:
            record = decoded(raw, _record, "response from Ollama")
        else:
            record = self._lines.whole(raw, routing, time.monotonic() - self._started)
        record["_routing"] = routing_object(routing, self._started)
        return msgspec.json.encode(record)


_record = msgspec.json.Decoder(dict[str, Any])


class LoadLines(Lines):
    """`Lines` of a request that only loads or unloads, and has no events."""

    def __init__(self, empty: dict[str, Any], reason: str) -> None:
        super().__init__("")
        self._empty = empty
        self._reason = reason

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Return no records: an engine's response to it is not an answer."""
        return []

    def empty(self) -> dict[str, Any]:
        """Return a record without content, sent while the model loads."""
        return self._empty

    def _closing(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        return {"done": True, "done_reason": self._reason}


class LoadEncoder(LineEncoder):
    """`Encoder` of a request that only loads: one JSON object, preceded by white space while it waits."""

    content_type = JSON

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Return white space, which JSON allows before the object."""
        return b"\n"

    def begin(self, routing: Routing) -> bytes:
        """Return no bytes; the record is the same for both engines."""
        return b""

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the only record."""
        return self.finish(routing).rstrip(b"\n")
