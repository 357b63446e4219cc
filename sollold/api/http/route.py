"""A row of the routing table: what is routed, and what the OpenAPI description says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from sollold.api.http.errors import Dialect
from sollold.facts import dataclass

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPENAI_PATHS = frozenset(("/v1", "/tokenize", "/detokenize", "/infill", "/apply-template", "/rerank"))
"""Beside those that begin so."""


@dataclass(frozen=True, slots=True)
class Route:
    """A row of the routing table.

    Attributes:
        method, path: as aiohttp routes them; ``GET`` does not imply ``HEAD``.
        summary: one line for the description.
        body: the type of the JSON body, when there is one.
        produces: content types of a good answer.
        statuses: what it may answer besides 200 and the errors that every route has.
        inference: it asks a model: the headers of priority and deadline count, the answer names its node.
        query: numbers from 0 that may stand in the query, name → what they mean.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type | None = None
    produces: tuple[str, ...] = ("application/json",)
    statuses: tuple[int, ...] = ()
    inference: bool = False
    query: tuple[tuple[str, str], ...] = ()

    @property
    def dialect(self) -> Dialect:
        """Whose error format it uses."""
        return dialect_of(self.path)


def dialect_of(path: str) -> Dialect:
    """The dialect whose error format a path uses, also where there is no route."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path in _OPENAI_PATHS or (path.startswith("/v1/") and not path.startswith("/v1/api/")):
        return Dialect.OPENAI
    return Dialect.OLLAMA
