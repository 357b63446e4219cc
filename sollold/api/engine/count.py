"""Counts the tokens of a chat's prompt with the model's own tokenizer, so the model is loaded."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from sollold.api.engine.calls import CHAT_PATH, build_ask, engine_body, ollama_body
from sollold.api.engine.placement import V1Fields
from sollold.api.engine.prepare import prepare_chat
from sollold.api.http.caller import caller_of
from sollold.api.http.off_loop import off_loop
from sollold.errors import Fault, Refusal
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.serving.request import Ask, Call, Engine
from sollold.undecodable import UNDECODABLE


async def count_ask(
    request: web.Request,
    body: dict[str, Any],
    parsed: V1Fields,
    listed: Listed,
    engine: dict[str, Any],
    native: dict[str, Any],
) -> Ask:
    """Build the `Ask` that counts the tokens of a chat's prompt.

    Args:
        body: the body of ``request``; ``parsed``: the same, decoded.
        engine: the chat in the form for llama-server; ``native``: for an Ollama.

    Raises:
        Refusal: as `caller_of`, `prepare_chat` and `build_ask`.
    """
    caller = caller_of(request, parsed.priority, parsed.timeout)

    def build() -> Ask:
        calls = _calls(listed.model, engine, native)
        return build_ask(caller, parsed.model, listed, calls, keep_alive=parsed.keep_alive)

    return await off_loop(request, body, build)


def _calls(model: Model, body: dict[str, Any], native: dict[str, Any]) -> dict[Engine, Call]:
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
