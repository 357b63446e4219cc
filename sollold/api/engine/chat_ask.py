"""Builds the `Ask` of dialects with their own form of chat: Anthropic's Messages, OpenAI's Responses."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sollold.api.engine.calls import build_ask, chat_calls
from sollold.api.engine.placement import V1Fields
from sollold.api.engine.prepare import Prepared
from sollold.api.http.caller import Caller
from sollold.api.http.off_loop import off_loop
from sollold.models.listing import Listed
from sollold.serving.request import Ask, Call


async def chat_ask(
    request: web.Request,
    body: dict[str, Any],
    parsed: V1Fields,
    listed: Listed,
    engine: dict[str, Any],
    native: Call,
    *,
    caller: Caller,
    prefix: str,
) -> tuple[Ask, Prepared]:
    """Build the `Ask`, and return it with the results of preparing the chat for llama-server.

    Args:
        body: the body of ``request``; ``parsed``: the same, decoded.
        engine: the body for llama-server; ``native``: the call to an Ollama.

    Raises:
        Refusal: as `chat_calls` and `build_ask`.
    """

    def build() -> tuple[Ask, Prepared]:
        calls, prepared = chat_calls(listed.model, llama=lambda: engine, ollama=native)
        ask = build_ask(
            caller,
            parsed.model,
            listed,
            calls,
            stream=True,
            keep_alive=parsed.keep_alive,
            context=parsed.num_ctx,
            prefix=prefix,
            placement=parsed.placement,
        )
        return ask, prepared

    return await off_loop(request, body, build)
