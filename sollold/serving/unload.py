"""Handles requests that only load or unload a model."""

from __future__ import annotations

import asyncio
import logging

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.errors import Fault, Refusal
from sollold.serving.attempts import BYPASS_LIMIT, Attempt, Attempts
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, ScoredCandidate
from sollold.serving.opening import ServingContext
from sollold.serving.protocol import StreamError
from sollold.serving.request import Ask, Call, Engine, Routing
from sollold.serving.routing import routing_of
from sollold.serving.stream import whole

log = logging.getLogger("sollold.serving")

TOUCH = Call("/tokenize", {"content": ""})
"""A minimal request to llama-server, which carries a keep_alive to its endpoint."""


async def unload(ask: Ask, query: EndpointQuery, context: ServingContext, attempts: Attempts) -> Routing:
    """End the model's deployments that are not in use, and have Ollama unload it.

    Returns the routing of one of its endpoints.

    Raises:
        Refusal: as its fault says.
    """
    view = context.view
    candidates = _named(query, context)
    if any(candidate.engine is Engine.LLAMA for candidate in candidates):
        await context.loader.unload(query, "requested by a client (keep_alive 0)")
    # One in use gets a request with keep_alive 0, so that it ends when idle.
    refused: Refusal | None = None
    for candidate in _named(query, context):
        if not candidate.endpoint.loaded:
            continue
        call = TOUCH if candidate.engine is Engine.LLAMA else ask.calls[Engine.OLLAMA]
        try:
            await _touch(ScoredCandidate(candidate, 0.0), call, query, attempts)
        except Refusal as refusal:
            if refusal.status != 404:
                refused = refusal
        except StreamError as error:
            log.info("could not tell an endpoint to unload: %s", error, extra={"request": ask.id})
    if refused is not None:
        raise refused
    if candidates:
        record, endpoint = candidates[0].record, candidates[0].endpoint
    else:
        # Nothing was loaded, which is the requested state.
        record = view.me
        endpoint = Endpoint("", query.model, query.digest, Backend.LOCAL, State.DRAINING)
    return routing_of(query.model, record, endpoint, view.live())


async def read_and_discard(attempt: Attempt, limit: float | None) -> None:
    """Read the response to its end, within ``limit`` seconds (None: no limit), and discard it.

    Raises:
        Refusal: ENGINE if it breaks off, UNAVAILABLE if it takes too long.
    """
    try:
        async with asyncio.timeout(limit):
            await whole(attempt.stream)
    except StreamError as error:
        raise Refusal(Fault.ENGINE, f"the engine failed: {error}", status=500) from None
    except TimeoutError:
        message = "the engine does not answer a small request; it may hang"
        raise Refusal(Fault.UNAVAILABLE, message, retry_after=5.0) from None


def _named(query: EndpointQuery, context: ServingContext) -> tuple[EndpointCandidate, ...]:
    """The endpoints with the requested name; llama.cpp's with the same content under another name stay."""
    now = asyncio.get_running_loop().time()
    candidates = context.router.candidates(context.view.live(), query, now)
    name = query.model.lower()
    # Ollama's endpoints were matched by name and manifest already.
    return tuple(c for c in candidates if c.engine is Engine.OLLAMA or c.endpoint.model.lower() == name)


async def _touch(choice: ScoredCandidate, call: Call, query: EndpointQuery, attempts: Attempts) -> None:
    # Bypass the queue, in which the request would wait for others or switch to another endpoint.
    attempt = await attempts.begin(choice, call, query, bypass_queue=True)
    if isinstance(attempt, Attempt):
        try:
            await read_and_discard(attempt, BYPASS_LIMIT)
        finally:
            await attempts.release(attempt, True)
