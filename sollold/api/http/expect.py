"""``Expect: 100-continue`` (RFC 9110, 10.1.1): the client sends its body once its request is accepted."""

from __future__ import annotations

from aiohttp import HttpVersion11, web

from sollold.api.http.exchange import Exchange, exchange_of


async def note_expectation(request: web.Request) -> None:
    """Remember that the client waits. Other expectations are ignored."""
    expected = request.headers["Expect"].lower()
    exchange_of(request).waits = request.version >= HttpVersion11 and expected == "100-continue"


def accept_body(request: web.Request, exchange: Exchange) -> None:
    """Let a client that waits send the body, which is about to be read."""
    waits, exchange.waits = exchange.waits, False
    if waits and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
