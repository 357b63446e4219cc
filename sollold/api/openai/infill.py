"""Completions with a ``suffix`` by llama-server's ``/infill``, whose events have their own form. Pure.

It takes a schema instead of a ``response_format``, and no images, system prompt or template.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.chunks import read_infilled
from sollold.api.openai.request import Completion
from sollold.api.openai.text_completion import TextPiece
from sollold.errors import bad_request


def infill_body(body: dict[str, Any], ask: Completion) -> dict[str, Any]:
    """Return the body for ``/infill``; ``body`` is the result of ``completion_body``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not isinstance(ask.prompt, str):
        raise bad_request("with a suffix, prompt must be a single string")
    if ask.n is not None and ask.n > 1:
        raise bad_request("with a suffix, n must be 1")
    excluded = ("prompt", "max_tokens", "logprobs", "n", "stream_options", "response_format")
    out = {key: value for key, value in body.items() if key not in excluded}
    out |= {"input_prefix": ask.prompt, "input_suffix": ask.suffix or ""}
    if ask.max_tokens is not None:
        out["n_predict"] = ask.max_tokens
    if ask.logprobs is not None:
        # llama-server takes 0 for no probabilities at all.
        out["n_probs"] = max(1, ask.logprobs)
    return out


def read_infilled_piece(raw: bytes) -> TextPiece:
    """Decode an event of ``/infill``.

    Raises:
        Refusal: ENGINE, as `read_infilled`.
    """
    event = read_infilled(raw)
    rows = msgspec.to_builtins(event.completion_probabilities)
    return TextPiece(
        event.content, rows, event.finish or None, event.tokens_evaluated, event.tokens_predicted
    )
