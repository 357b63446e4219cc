"""Server-sent events that pass the engine's payloads on unread: the OpenAI dialect and llama-server's own."""

from __future__ import annotations

from collections.abc import Callable

from sollold.api.fault_shape import Dialect, refusal_bytes
from sollold.api.openai_request import both_reasonings
from sollold.api.prefill import NOTHING, Begun
from sollold.api.reply import SSE, waiting_text
from sollold.serving.ask import Engine, Refusal, Routing, Waiting


def comment(waiting: Waiting) -> bytes:
    """A comment: every client of server-sent events passes over it."""
    return b": " + waiting_text(waiting).encode("ascii") + b"\n\n"


class ChunkForm:
    """`Form` of chat and completions: ``data:`` lines, then ``[DONE]``, or an error event."""

    dialect = Dialect.OPENAI
    content_type = SSE
    finished = False

    def __init__(self, begun: Begun = NOTHING) -> None:
        """``begun``: of the answer, by the caller."""
        self._begun = begun

    def begin(self, routing: Routing) -> bytes:
        """Nothing."""
        return b""

    def event(self, raw: bytes) -> bytes:
        """The event as it is."""
        return b"data: " + both_reasonings(raw) + b"\n\n"

    def end(self, routing: Routing) -> bytes:
        """``[DONE]``."""
        return b"data: [DONE]\n\n"

    def fail(self, refusal: Refusal) -> bytes:
        """The error as an event; nothing follows."""
        return b"data: " + refusal_bytes(Dialect.OPENAI, refusal) + b"\n\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A comment."""
        return comment(waiting)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The answer, without what the caller began himself."""
        return both_reasonings(self._begun.cut_from(raw) if routing.engine is Engine.LLAMA else raw)


class PlainForm(ChunkForm):
    """`Form` of routes that are llama-server's own: nothing is read, no ``[DONE]``."""

    def __init__(self, change: Callable[[bytes], bytes] | None = None) -> None:
        """``change`` is applied to a whole answer."""
        super().__init__()
        self._change = change

    def event(self, raw: bytes) -> bytes:
        """The event as it is."""
        return b"data: " + raw + b"\n\n"

    def end(self, routing: Routing) -> bytes:
        """Nothing."""
        return b""

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The answer, changed if so wished."""
        return self._change(raw) if self._change is not None else raw
