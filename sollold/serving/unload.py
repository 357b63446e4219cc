"""Requests that only tell an engine how long to keep a model: loading it, and unloading it."""

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
"""The smallest request that a llama-server answers: with it an endpoint learns of keep_alive."""


async def unload(ask: Ask, query: EndpointQuery, context: ServingContext, attempts: Attempts) -> Routing:
    """End the deployments of the model that are not in use, and let an Ollama unload it.

    Returns where it was.

    Raises:
        Refusal: as its fault says.
    """
    view = context.view
    candidates = _named(query, context)
    if any(candidate.engine is Engine.LLAMA for candidate in candidates):
        await context.loader.unload(query, "requested by a client (keep_alive 0)")
    # One that is in use ends when it is idle: it learns of it by a request with keep_alive 0.
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
            log.info("an endpoint was not told to unload: %s", error, extra={"request": ask.id})
    if refused is not None:
        raise refused
    if candidates:
        record, endpoint = candidates[0].record, candidates[0].endpoint
    else:
        # Nothing was loaded, which is what was asked for.
        record = view.me
        endpoint = Endpoint("", query.model, query.digest, Backend.LOCAL, State.DRAINING)
    return routing_of(query.model, record, endpoint, view.live())


async def read_away(attempt: Attempt, limit: float | None) -> None:
    """Read the answer to its end, in ``limit`` seconds; None: in whatever time it takes.

    Raises:
        Refusal: ENGINE when it breaks off, UNAVAILABLE when it takes too long.
    """
    try:
        async with asyncio.timeout(limit):
            await whole(attempt.stream)
    except StreamError as error:
        raise Refusal(Fault.ENGINE, f"the engine failed: {error}", status=500) from None
    except TimeoutError:
        why = "the engine does not answer a small request; it may hang"
        raise Refusal(Fault.UNAVAILABLE, why, retry_after=5.0) from None


def _named(query: EndpointQuery, context: ServingContext) -> tuple[EndpointCandidate, ...]:
    """The endpoints of just the name that was asked for: the same content under another one stays."""
    now = asyncio.get_running_loop().time()
    found = context.router.candidates(context.view.live(), query, now)
    name = query.model.lower()
    # An Ollama's are by name already.
    return tuple(c for c in found if c.engine is Engine.OLLAMA or c.endpoint.model.lower() == name)


async def _touch(choice: ScoredCandidate, call: Call, query: EndpointQuery, attempts: Attempts) -> None:
    # Past the queue: in it the request would wait for others, or be sent to another endpoint.
    attempt = await attempts.begin(choice, call, query, bypass_queue=True)
    if isinstance(attempt, Attempt):
        try:
            await read_away(attempt, BYPASS_LIMIT)
        finally:
            await attempts.release(attempt, True)
