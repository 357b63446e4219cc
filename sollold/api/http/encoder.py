"""How an answer is written in a dialect."""

from __future__ import annotations

from typing import Protocol

from sollold.api.http.errors import Dialect
from sollold.errors import Refusal
from sollold.serving.request import Routing, Waiting


class Encoder(Protocol):
    """One answer in one dialect; a new one for each request. Its methods are called in order."""

    dialect: Dialect
    content_type: str
    """Of the streamed answer."""

    @property
    def finished(self) -> bool:
        """The answer is complete though the engine has not ended: no more events are read."""
        ...

    def begin(self, routing: Routing) -> bytes:
        """Bytes before the first event; the engine is known now."""
        ...

    def event(self, raw: bytes) -> bytes:
        """The bytes for one event of the engine; may be empty."""
        ...

    def finish(self, routing: Routing) -> bytes:
        """Bytes after the last event."""
        ...

    def fail(self, refusal: Refusal) -> bytes:
        """An error in the stream, and whatever ends it."""
        ...

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Bytes that the dialect's clients ignore."""
        ...

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The body of an answer that is not streamed."""
        ...
