"""A caller who hangs up before his answer begins: no fault, so no line in the log."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

log = logging.getLogger("sollold.cluster")


def hung_up(request: web.Request) -> bool:
    """Whether nobody is there to read the answer."""
    return request.transport is None or request.transport.is_closing()


@web.middleware
async def quiet_hang_up(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost: to aiohttp what such a caller leaves behind is an error like any other.

    Mostly it cancels the handler first; not when both happen in one turn of the loop.
    """
    try:
        return await handler(request)
    except ConnectionError:
        if not hung_up(request):
            raise
        log.debug("the caller of %s %s hung up", request.method, request.path)
        return web.Response()
