"""Handles clients that disconnect before their response starts: no fault, so only a debug message."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

log = logging.getLogger("sollold.cluster")


def hung_up(request: web.Request) -> bool:
    """Whether the client has disconnected."""
    return request.transport is None or request.transport.is_closing()


@web.middleware
async def quiet_hang_up(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware, which keeps aiohttp from logging such a disconnect as an error.

    Usually aiohttp cancels the handler first, but not if both happen in one turn of the loop.
    """
    try:
        return await handler(request)
    except ConnectionError:
        if not hung_up(request):
            raise
        log.debug("the caller of %s %s hung up", request.method, request.path)
        return web.Response()
