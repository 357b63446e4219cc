"""What is known of an HTTP request while it is answered, from its first check to its log line."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from sollold.api.http.access import Client
    from sollold.control.activity import FinishedRequest
    from sollold.errors import Refusal
    from sollold.serving.byte_budget import ByteBudget
    from sollold.serving.media import Media

_ID = re.compile(r"[\w.:\-]{1,64}", re.ASCII)


class Exchange(msgspec.Struct):
    """A request and the response to it. One object, since aiohttp's storage takes a call for each value.

    Attributes:
        id: the caller's ``X-Request-Id`` if it is valid, else random.
        route: its route, without the prefix ``/v1`` of Ollama's routes; empty if it has none.
        waits: its client waits to send the body.
        client: who sent it; None until it is known.
        budget: limits the bytes of all bodies; ``counted``: those of this body.
        body: the bytes received, once all have been; ``media``: what was cut out of them.
        begun: the response, once its headers are prepared.
        revoked: why its handler was cancelled, if the key that it presented is no longer valid.
        finished: how it ended, for a request to a model.
        refused: why it was refused; empty if it was not.
    """

    id: str
    route: str
    waits: bool = False
    client: Client | None = None
    budget: ByteBudget | None = None
    counted: int = 0
    body: bytearray | None = None
    media: Media | None = None
    begun: web.StreamResponse | None = None
    revoked: Refusal | None = None
    finished: FinishedRequest | None = None
    refused: str = ""

    @property
    def holder(self) -> str:
        """The client whose bodies are limited together; empty for programs on this machine."""
        return "" if self.client is None or self.client.local else self.client.identity


_EXCHANGE = web.RequestKey("exchange", Exchange)


def exchange_of(request: web.Request) -> Exchange:
    """Return the exchange of ``request``, made at the first call."""
    try:
        return request[_EXCHANGE]
    except KeyError:
        id = request.headers.get("X-Request-Id", "")
        if not _ID.fullmatch(id):
            id = os.urandom(8).hex()
        exchange = request[_EXCHANGE] = Exchange(id, route_of(request))
        return exchange


def adopt(request: web.Request, exchange: Exchange) -> None:
    """Make ``exchange`` that of ``request``."""
    request[_EXCHANGE] = exchange


def route_of(request: web.Request) -> str:
    """Return the route of a request as in `Exchange.route`."""
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else ""
    return path.removeprefix("/v1") if path.startswith("/v1/api/") else path
