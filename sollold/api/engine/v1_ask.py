"""Builds the `Ask` of a request to ``/v1``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from sollold.api.engine.calls import build_ask
from sollold.api.engine.placement import V1Fields
from sollold.api.engine.prepare import Prepared
from sollold.api.http.caller import caller_of
from sollold.api.http.off_loop import off_loop
from sollold.models.listing import Listed
from sollold.serving.request import Ask, Call, Engine


async def v1_ask(
    request: web.Request,
    body: dict[str, Any],
    parsed: V1Fields,
    listed: Listed,
    calls: Callable[[], tuple[dict[Engine, Call], Prepared]],
    *,
    stream: bool = False,
    embedding: bool = False,
    prefix: str = "",
) -> tuple[Ask, Prepared]:
    """Build the `Ask`, and return it with the results of preparing the request for llama-server.

    Args:
        body: the body of ``request``; ``parsed``: the same, decoded.
        calls: builds the call for each engine; off the loop if that may be slow.

    Raises:
        Refusal: as ``calls``, `caller_of` and `build_ask`.
    """
    caller = caller_of(request, parsed.priority, parsed.timeout)

    def build() -> tuple[Ask, Prepared]:
        built, prepared = calls()
        ask = build_ask(
            caller,
            parsed.model or listed.model.name,
            listed,
            built,
            stream=stream,
            keep_alive=parsed.keep_alive,
            context=parsed.num_ctx,
            embedding=embedding,
            prefix=prefix,
            placement=parsed.placement,
        )
        return ask, prepared

    return await off_loop(request, body, build)
