"""``Expect: 100-continue`` (RFC 9110, 10.1.1): the client sends its body once its request is accepted."""

from __future__ import annotations

from aiohttp import HttpVersion11, web

_WAITS = web.RequestKey("waits_to_send", bool)


async def note_expectation(request: web.Request) -> None:
    """Remember that the client waits. Other expectations are ignored."""
    request[_WAITS] = request.version >= HttpVersion11 and request.headers["Expect"].lower() == "100-continue"


def accept_body(request: web.Request) -> None:
    """Let a client that waits send the body, which is about to be read."""
    if request.pop(_WAITS, False) and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def is_waiting(request: web.Request) -> bool:
    """Whether the client still waits: it may send its body after the response, or not at all."""
    return bool(request.get(_WAITS, False))
