"""Rows of the routing table, with what the OpenAPI description says about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from sollold.api.http.errors import Dialect
from sollold.errors import bad_request
from sollold.facts import dataclass

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPENAI_PATHS = frozenset(("/v1", "/tokenize", "/detokenize", "/infill", "/apply-template", "/rerank"))
"""OpenAI's paths that do not begin with ``/v1/``."""


@dataclass(frozen=True, slots=True)
class Route:
    """A row of the routing table.

    Attributes:
        method, path: as aiohttp routes them; ``GET`` implies ``HEAD``, except for streams of events.
        summary: one line for the description.
        body: the type of the JSON body, if there is one.
        produces: content types of a successful response.
        statuses: possible statuses besides 200 and the errors that every route has.
        inference: it runs a model: priority and deadline headers apply, and the response names its node.
        query: optional parameters of the query: name → meaning. They are integers from 0, except those in
            ``string_query``.
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
    string_query: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods for which the handler is registered."""
        both = self.method == "GET" and "text/event-stream" not in self.produces
        return ("GET", "HEAD") if both else (self.method,)

    @property
    def dialect(self) -> Dialect:
        """The dialect of its errors."""
        return dialect_of(self.path)


def integer_of(query: Mapping[str, str], name: str, default: int, digits: int = 9) -> int:
    """Return an integer of at most ``digits`` digits from a request's query.

    Raises:
        Refusal: BAD_REQUEST.
    """
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= digits):
        raise bad_request(f"{name} must be an integer of at most {digits} digits")
    return int(text)


def dialect_of(path: str) -> Dialect:
    """Return the dialect of a path's errors, even if it has no route."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path in _OPENAI_PATHS or (path.startswith("/v1/") and not path.startswith("/v1/api/")):
        return Dialect.OPENAI
    return Dialect.OLLAMA
