"""A request's own span, under which stands all that is done for it."""

from __future__ import annotations

from collections.abc import Awaitable

from aiohttp import web

from sollold import tracing
from sollold.api.http.access import route_of
from sollold.api.http.caller import ID
from sollold.api.http.request_log import FINISHED


async def traced(request: web.Request, answer: Awaitable[web.StreamResponse]) -> web.StreamResponse:
    """Await ``answer`` within a span that tells of it as OpenTelemetry's conventions for HTTP and AI have it.

    A caller's ``traceparent`` is taken up. Reading (GET) is not traced: dashboards and monitors poll.
    """
    if request.method != "POST":
        return await answer
    facts: dict[str, tracing.Value] = {"http.request.method": request.method, "sollold.request": request[ID]}
    with tracing.span(f"POST {request.path[:200]}", facts, request.headers.get("traceparent", "")) as span:
        try:
            response = await answer
            span.set({"http.response.status_code": response.status})
            return response
        finally:
            # The route is known, and whether the caller hung up, when the handler has ended.
            span.set({"http.route": route_of(request)})
            if (done := request.get(FINISHED)) is not None:
                span.set(
                    {
                        "gen_ai.request.model": done.model,
                        "gen_ai.usage.input_tokens": done.prompt_tokens,
                        "gen_ai.usage.output_tokens": done.tokens,
                        "sollold.node": done.node,
                        "sollold.resumed": done.resumed,
                        "sollold.outcome": done.outcome,
                    }
                )
