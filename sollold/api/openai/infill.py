"""Completions with a ``suffix`` by llama-server's ``/infill``, whose events have their own form. Pure.

It takes a schema instead of a ``response_format``, and no images, system prompt or template.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.infill_events import Infilled, read_infilled
from sollold.api.openai.completion_logprobs import LogprobColumns
from sollold.api.openai.request import Completion
from sollold.api.openai.sse import ChunkEncoder
from sollold.api.openai.text_completion import TextCompletion, choice_of
from sollold.errors import Fault, Refusal
from sollold.serving.request import Engine, Routing


def infill_body(body: dict[str, Any], ask: Completion) -> dict[str, Any]:
    """Return the body for ``/infill``; ``body`` is the result of ``completion_body``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not isinstance(ask.prompt, str):
        raise Refusal(Fault.BAD_REQUEST, "with a suffix, prompt must be a single string")
    if ask.n is not None and ask.n > 1:
        raise Refusal(Fault.BAD_REQUEST, "with a suffix, n must be 1")
    excluded = ("prompt", "max_tokens", "logprobs", "n", "stream_options", "response_format")
    out = {key: value for key, value in body.items() if key not in excluded}
    out |= {"input_prefix": ask.prompt, "input_suffix": ask.suffix or ""}
    if ask.max_tokens is not None:
        out["n_predict"] = ask.max_tokens
    if ask.logprobs is not None:
        # llama-server takes 0 for no probabilities at all.
        out["n_probs"] = max(1, ask.logprobs)
    return out


class InfillEncoder(ChunkEncoder):
    """`Encoder` of a completion with a suffix: OpenAI's chunks from either engine."""

    def __init__(self, ask: Completion, model: str) -> None:
        super().__init__(model)
        self._completion = TextCompletion(ask, model)
        self._engine = Engine.LLAMA
        self._columns = LogprobColumns(ask.logprobs) if ask.logprobs is not None else None

    def begin(self, routing: Routing) -> bytes:
        """Remember the engine; no bytes are sent."""
        self._engine = routing.engine
        return b""

    def event(self, raw: bytes) -> bytes:
        """Return the chunk for one event, followed by the usage after the last."""
        if self._engine is Engine.OLLAMA:
            return super().event(self._columns.event(raw) if self._columns is not None else raw)
        event = read_infilled(raw)
        return self._completion.events(self._choice(event), event.tokens_evaluated, event.tokens_predicted)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """Return the whole answer."""
        if routing.engine is Engine.OLLAMA:
            return super().whole(self._columns.event(raw) if self._columns is not None else raw, routing)
        event = read_infilled(raw)
        return self._completion.whole(self._choice(event), event.tokens_evaluated, event.tokens_predicted)

    def _choice(self, event: Infilled) -> dict[str, Any]:
        rows = msgspec.to_builtins(event.completion_probabilities)
        logprobs = {"content": rows, **self._columns.columns(rows)} if rows and self._columns else None
        return choice_of(event.content, logprobs, event.finish or None)
