"""Counts the tokens of a chat's prompt with the model's own tokenizer, so the model is loaded."""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.calls import CHAT_PATH, engine_body, ollama_body
from sollold.api.engine.prepare import prepare_chat
from sollold.errors import Fault, Refusal
from sollold.models.model import Model
from sollold.serving.request import Call, Engine
from sollold.undecodable import UNDECODABLE


def count_calls(model: Model, body: dict[str, Any], native: dict[str, Any]) -> dict[Engine, Call]:
    """Return the calls that count a chat's prompt; ``native`` is the chat in the form for an Ollama.

    Raises:
        Refusal: BAD_REQUEST, as `prepare_chat`.
    """
    if model.only_ollama:
        # An Ollama reports the count only with an answer.
        return {Engine.OLLAMA: Call(CHAT_PATH, {**ollama_body(_unstreamed(native), model), "max_tokens": 1})}
    counted = engine_body(_unstreamed(body))
    prepare_chat(counted)
    return {Engine.LLAMA: Call(f"{CHAT_PATH}/input_tokens", counted)}


def _unstreamed(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("stream", "stream_options")}


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Count(msgspec.Struct):
    input_tokens: int | None = None
    usage: _Usage | None = None


def read_count(raw: bytes) -> int:
    """Return the count in an engine's response.

    Raises:
        Refusal: ENGINE if it has none.
    """
    try:
        count = msgspec.json.decode(raw, type=_Count)
    except UNDECODABLE:
        count = _Count()
    tokens = count.usage.prompt_tokens if count.usage is not None else count.input_tokens
    if tokens is None:
        raise Refusal(Fault.ENGINE, "the engine's token count is unreadable")
    return tokens
