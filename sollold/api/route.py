"""One row of the API: what is routed, and what the OpenAPI description says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from sollold.api.fault_shape import Dialect

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """Attributes:
    method, path: as aiohttp routes them; ``GET`` does not imply ``HEAD``.
    dialect: whose errors it speaks.
    summary: one line for the description.
    body: the type of the JSON body, when there is one.
    produces: content types of a good answer.
    statuses: what it may answer besides 200 and the errors that every route has.
    turn: it asks a model: the headers that say whose turn it should be count, the answer says who gave it.
    query: numbers from 0 that may stand in the query, name → what they mean.
    """

    method: str
    path: str
    handler: Handler
    dialect: Dialect
    summary: str
    body: type | None = None
    produces: tuple[str, ...] = ("application/json",)
    statuses: tuple[int, ...] = ()
    turn: bool = False
    query: tuple[tuple[str, str], ...] = ()
