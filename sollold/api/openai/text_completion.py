"""Encodes OpenAI's text completions, also from an engine whose events have a form of their own. Pure."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from sollold.api.engine.chunks import edit_each, with_shown_logprobs
from sollold.api.engine.encoders import SseEncoder
from sollold.api.http.encoder import Encoder
from sollold.api.openai.request import Completion
from sollold.facts import dataclass
from sollold.serving.request import Engine, Routing


class LogprobColumns:
    """Adds OpenAI's columns to the log-probabilities of one answer. ``alternatives``: maximum per token.

    A chat has one object per token (``content``), a completion one list per field (``tokens``,
    ``token_logprobs``, ``top_logprobs``, ``text_offset``). Engines give the first form on both routes.
    """

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._offsets: dict[int, int] = {}
        """Length of each choice's text so far, in characters."""

    def event(self, raw: bytes) -> bytes:
        """Return a chunk or a whole answer with the columns added; unchanged if it can't be parsed."""
        return edit_each(raw, self._add) if b'"logprobs"' in raw else raw

    def _add(self, choice: dict[str, Any]) -> None:
        if choice.get("logprobs"):
            choice["logprobs"] |= self.columns(choice["logprobs"]["content"], choice.get("index", 0))

    def columns(self, rows: list[dict[str, Any]], choice: int = 0) -> dict[str, Any]:
        """Return the columns for ``rows``, the next tokens of a choice.

        Raises:
            KeyError, TypeError: the rows are malformed.
        """
        offsets = []
        for row in rows:
            offsets.append(self._offsets.setdefault(choice, 0))
            self._offsets[choice] += len(row["token"])
        top = [
            {entry["token"]: entry["logprob"] for entry in row["top_logprobs"][: self._alternatives]}
            for row in rows
        ]
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": top if self._alternatives else None,
            "text_offset": offsets,
        }


@dataclass(frozen=True, slots=True)
class TextPiece:
    """An event of such an engine, or its whole answer.

    Attributes:
        text: the next part of the text.
        rows: log-probabilities of its tokens.
        finish: OpenAI's ``finish_reason``; None before the end.
        prompt, generated: number of tokens so far.
    """

    text: str
    rows: list[dict[str, Any]] | None
    finish: str | None
    prompt: int
    generated: int


class CompletionEncoder(SseEncoder):
    """`Encoder` of completions: OpenAI's chunks from either engine."""

    def __init__(
        self, ask: Completion, model: str, chunks: Encoder, other: Engine, read: Callable[[bytes], TextPiece]
    ) -> None:
        """``chunks``: encoder of the events that are chunks; ``other``: the engine whose events are not, and
        are decoded by ``read``.
        """
        self._chunks = chunks
        self._other = other
        self._read = read
        self._translates = False
        self._columns = LogprobColumns(ask.logprobs) if ask.logprobs is not None else None
        self._counted = ask.counted
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self, routing: Routing) -> bytes:
        """Remember which engine answers."""
        self._translates = routing.engine is self._other
        return self._chunks.begin(routing)

    def event(self, raw: bytes) -> bytes:
        """Return the chunk for one event, followed by the usage after the last."""
        raw = with_shown_logprobs(raw)
        if not self._translates:
            return self._chunks.event(self._columns.event(raw) if self._columns is not None else raw)
        piece = self._read(raw)
        chunks = [{**self._head, "choices": [self._choice(piece)]}]
        if piece.finish is not None and self._counted:
            chunks.append({**self._head, "choices": [], "usage": _usage(piece)})
        return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)

    def finish(self, routing: Routing) -> bytes:
        """Return ``[DONE]``."""
        return self._chunks.finish(routing)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the whole answer."""
        raw = with_shown_logprobs(raw)
        if routing.engine is not self._other:
            return self._chunks.whole(self._columns.event(raw) if self._columns is not None else raw, routing)
        piece = self._read(raw)
        return msgspec.json.encode({**self._head, "choices": [self._choice(piece)], "usage": _usage(piece)})

    def _choice(self, piece: TextPiece) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if piece.rows and self._columns is not None:
            logprobs = {"content": piece.rows}
            with contextlib.suppress(KeyError, TypeError):
                logprobs |= self._columns.columns([{"top_logprobs": [], **row} for row in piece.rows])
        return {"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def _usage(piece: TextPiece) -> dict[str, int]:
    return {
        "prompt_tokens": piece.prompt,
        "completion_tokens": piece.generated,
        "total_tokens": piece.prompt + piece.generated,
    }
