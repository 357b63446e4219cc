"""The interface of encoders, which write an answer in a dialect."""

from __future__ import annotations

from typing import Protocol

from sollold.api.http.errors import Dialect
from sollold.errors import Refusal
from sollold.serving.request import Routing, Waiting


class Encoder(Protocol):
    """Encodes one answer in one dialect; each request has its own. The methods are called in order."""

    dialect: Dialect
    content_type: str
    """Content type of the streamed answer."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete although the engine has not finished: no more events are read."""
        ...

    def begin(self, routing: Routing) -> bytes:
        """Return the bytes before the first event; the engine is known now."""
        ...

    def event(self, raw: bytes) -> bytes:
        """Return the bytes for one event of the engine; may be empty."""
        ...

    def finish(self, routing: Routing) -> bytes:
        """Return the bytes after the last event."""
        ...

    def fail(self, refusal: Refusal) -> bytes:
        """Return the bytes of an error in the stream, and of the end of the stream."""
        ...

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Return bytes that the dialect's clients ignore."""
        ...

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the body of an answer that is not streamed."""
        ...
