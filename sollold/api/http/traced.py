"""The span of a request, the parent of everything that is done for it."""

from __future__ import annotations

from collections.abc import Awaitable

from aiohttp import web

from sollold import tracing
from sollold.api.http.exchange import Exchange


async def traced(
    request: web.Request, exchange: Exchange, answer: Awaitable[web.StreamResponse]
) -> web.StreamResponse:
    """Await ``answer`` within a span that follows OpenTelemetry's conventions for HTTP and AI.

    A caller's ``traceparent`` is continued. Only POST is traced: dashboards and monitors poll with GET.
    """
    if request.method != "POST":
        return await answer
    facts: dict[str, tracing.Value] = {"http.request.method": request.method, "sollold.request": exchange.id}
    with tracing.span(f"POST {request.path[:200]}", facts, request.headers.get("traceparent", "")) as span:
        try:
            response = await answer
            span.set({"http.response.status_code": response.status})
            return response
        finally:
            # The route, and whether the caller hung up, are known when the handler has ended.
            span.set({"http.route": exchange.route})
            if (record := exchange.finished) is not None:
                span.set(
                    {
                        "gen_ai.request.model": record.model,
                        "gen_ai.usage.input_tokens": record.prompt_tokens,
                        "gen_ai.usage.output_tokens": record.tokens,
                        "sollold.node": record.node,
                        "sollold.resumed": record.resumed,
                        "sollold.outcome": record.outcome,
                    }
                )
