"""Ends a request whose key is revoked or expires while it is being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from sollold.api.http.exchange import exchange_of
from sollold.errors import Refusal, bad_request

CHECK_SECONDS = 1.0
"""Interval at which the key is checked, in seconds."""
LAST_WORDS_SECONDS = 5.0
"""Time for the caller to take the error if a response has begun, in seconds."""


async def while_valid(
    request: web.Request,
    valid: Callable[[], bool],
    answer: Callable[[], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """Return the result of ``answer``, cancelling it once the key is no longer ``valid`` (see `revoked`).

    Raises:
        Refusal: BAD_REQUEST with status 401: it was cancelled.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def check() -> None:
        nonlocal timer
        if valid():
            timer = loop.call_later(CHECK_SECONDS, check)
            return
        exchange_of(request).revoked = bad_request(
            "the API key was revoked or has expired during this request", status=401
        )
        limit.reschedule(loop.time())

    timer = loop.call_later(CHECK_SECONDS, check)
    try:
        async with asyncio.timeout(None) as limit:
            return await answer()
    except TimeoutError:
        refusal = revoked(request)
        if refusal is None:
            raise
        raise refusal from None
    finally:
        timer.cancel()


def revoked(request: web.Request) -> Refusal | None:
    """Return the refusal if the handler of ``request`` was cancelled because of its key, else None."""
    return exchange_of(request).revoked
