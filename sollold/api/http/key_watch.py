"""Ends what is being answered with a key that is revoked, or expires, meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from sollold.errors import Fault, Refusal

LOOK_SECONDS = 1.0
LAST_WORDS_SECONDS = 5.0
"""For the error to be taken, where an answer has begun."""
BEGUN = web.RequestKey("begun", web.StreamResponse)
"""Where a request keeps the response whose headers are sent."""
_REVOKED = web.RequestKey("key_revoked", Refusal)


async def while_valid(
    request: web.Request,
    valid: Callable[[], bool],
    answer: Callable[[], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """What ``answer`` gives, which is cancelled when the key is ``valid`` no more (`revoked` says so then).

    Raises:
        Refusal: BAD_REQUEST with status 401: it was cancelled.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        if valid():
            timer = loop.call_later(LOOK_SECONDS, look)
            return
        request[_REVOKED] = Refusal(
            Fault.BAD_REQUEST, "the API key was revoked or has expired during this request", status=401
        )
        limit.reschedule(loop.time())

    timer = loop.call_later(LOOK_SECONDS, look)
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
    """Why the handler of ``request`` was cancelled; None: for another reason."""
    return request.get(_REVOKED)
