"""Checks each request before its handler, and converts errors to responses, in the caller's dialect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from sollold import tracing
from sollold.api.http.access import Access
from sollold.api.http.answer_budget import AnswerBudget
from sollold.api.http.body import release_body
from sollold.api.http.client_address import address_of
from sollold.api.http.cors import Origins, allowed
from sollold.api.http.errors import Dialect, error_object, refusal_bytes
from sollold.api.http.exchange import Exchange, adopt, exchange_of, route_of
from sollold.api.http.hosts import Hosts, cross_site
from sollold.api.http.key_watch import LAST_WORDS_SECONDS, while_valid
from sollold.api.http.request_log import RequestLog, ResponseCounts
from sollold.api.http.response import NDJSON, json_response, refusal_response
from sollold.api.http.route import Handler, dialect_of
from sollold.api.http.traced import traced
from sollold.cluster.net.hang_up import hung_up
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.byte_budget import ByteBudget

log = logging.getLogger("sollold.api")

_HUNG_UP = 499
"""Status in the counts for a request whose caller hung up; it is never sent."""
_SLASHES = re.compile(r"/{2,}")
_PREFIXES = re.compile(r"^(?:/(?:v1|api|ollama|openai|anthropic|codex))+(/v1|/api)(?=/)")
"""Prefixes of programs that serve several APIs on one port (Open WebUI), and Ollama's ``/api/codex/v1``."""
_OPENAI_PATH = re.compile(r"/(?:chat/completions|completions|embeddings|models|responses|messages)(?:/|$)")
"""Paths that llama-server also serves without a prefix."""
_RERANK_PATH = re.compile(r"(?:/v[12])?/rerank(?:ing)?")
"""Paths of llama-server, Jina and Cohere."""

_ROOT_PATH = re.compile(r"/v1(/(?:health|infill|tokenize|detokenize|apply-template))")
"""Paths without a prefix, of clients whose base URL ends in one."""
_INSTEAD = {
    "/completion": "/v1/completions",
    "/embedding": "/v1/embeddings",
    "/props": "/api/show and /api/ps",
    "/slots": "/api/ps and /api/cluster/requests",
    "/api/v0/models": "/v1/models",
    "/api/v0/chat/completions": "/v1/chat/completions",
}
"""What replaces paths of llama-server and LM Studio that are not served: clients identify those by them."""


def canonical_path(path: str) -> str:
    """Return a path that has no route in the form that routes have.

    Clients join a base URL that ends in a slash with a path that begins with one, and people enter a base URL
    with the prefix that the client adds itself, with another API's, or with none.
    """
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    path = _PREFIXES.sub(r"\1", path)
    if _RERANK_PATH.fullmatch(path):
        return "/v1/rerank"
    if root := _ROOT_PATH.fullmatch(path):
        return root[1]
    return f"/v1{path}" if _OPENAI_PATH.match(path) else path


def _dialect(request: web.Request, route: str) -> Dialect:
    """Return the dialect of the errors of a request."""
    dialect = dialect_of(route or canonical_path(request.path))
    # Paths that Anthropic's clients share with OpenAI's, and unknown paths.
    shared = not route or route.startswith("/v1/models")
    if dialect is Dialect.OPENAI and shared and "anthropic-version" in request.headers:
        return Dialect.ANTHROPIC
    return dialect


@dataclass(frozen=True, slots=True)
class Guard:
    """Refuses forbidden requests, and formats errors in the dialect; no traceback leaves the node."""

    origins: Origins
    hosts: Hosts
    access: Access
    answers: ResponseCounts
    requests: RequestLog
    bodies: ByteBudget
    unread: AnswerBudget

    def middleware(self) -> Middleware:
        """Return the middleware for aiohttp."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            exchange = exchange_of(request)
            exchange.budget = self.bodies
            dialect = _dialect(request, exchange.route)
            started = time.monotonic()
            status = _HUNG_UP
            try:
                answer = self._answer(request, exchange, handler, dialect)
                response = await (traced(request, exchange, answer) if tracing.on() else answer)
                response = self._counted(exchange, dialect, response)
                status = response.status
                return response
            finally:
                release_body(exchange)
                record = exchange.finished
                if status == _HUNG_UP and record is not None and record.outcome == "ok":
                    status = 200  # The caller has received the whole answer.
                self.answers.add(dialect, exchange.route, status, time.monotonic() - started)
                # An answer in one piece is written before its log line.
                asyncio.get_running_loop().call_soon(self.requests.write, request, exchange, status, started)

        return guard

    def _counted(
        self, exchange: Exchange, dialect: Dialect, response: web.StreamResponse
    ) -> web.StreamResponse:
        """Count a large answer until it is sent; if too many wait to be read, return a refusal instead."""
        if not isinstance(response, web.Response) or not isinstance(response.body, bytes | bytearray):
            return response
        body = self.unread.counted(response.body, exchange.holder)
        if body is None:
            message = "the answers that clients have not read yet use too much memory; try again later"
            return refusal_response(dialect, Refusal(Fault.UNAVAILABLE, message), exchange.id)
        response.body = body
        return response

    async def _answer(
        self, request: web.Request, exchange: Exchange, handler: Handler, dialect: Dialect
    ) -> web.StreamResponse:
        peer = address_of(request, self.access.proxies)
        if forbidden := _cross_origin_refusal(request, self.origins, self.hosts, local=peer.local):
            return json_response_of(dialect, 403, forbidden, exchange.id)
        if request.method == "OPTIONS" and (
            "Access-Control-Request-Method" in request.headers or request.path == "*"
        ):
            return web.Response(status=204)
        try:
            await self.access.admit(request, exchange, peer)
            key = exchange.client.key if exchange.client is not None else None
            if key is None or peer.local:
                return await handler(request)
            return await while_valid(request, lambda: self.access.valid(key), lambda: handler(request))
        except Refusal as refusal:
            exchange.refused = refusal.message
            if refusal is exchange.revoked and exchange.begun is not None:
                return await _cut_short(request, exchange.begun, dialect, refusal)
            return refusal_response(dialect, refusal, exchange.id)
        except web.HTTPNotFound:
            return await self._renamed_or_unknown(request, exchange, dialect)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return _http_error(dialect, error, exchange.id)
        except Exception as error:
            if isinstance(error, ConnectionError) and hung_up(request):
                raise
            log.exception("%s %s failed", request.method, request.path, extra={"request": exchange.id})
            message = f"internal error; see the node's log for request {exchange.id}"
            return json_response_of(dialect, 500, message, exchange.id)

    async def _renamed_or_unknown(
        self, request: web.Request, exchange: Exchange, dialect: Dialect
    ) -> web.StreamResponse:
        renamed = await _renamed(request)
        if renamed is None:
            instead = _INSTEAD.get(request.path)
            advice = f"use {instead}; " if instead else ""
            message = f"unknown path {request.path[:200]}; {advice}/openapi.json lists all routes"
            return json_response_of(dialect, 404, message, exchange.id)
        other = msgspec.structs.replace(exchange, route=route_of(renamed))
        adopt(renamed, other)
        try:
            return await self._answer(renamed, other, renamed.match_info.handler, dialect)
        finally:
            release_body(other)
            # The log line and the metrics of a request contain them.
            exchange.route = other.route
            exchange.client, exchange.finished, exchange.refused = other.client, other.finished, other.refused


async def _cut_short(
    request: web.Request, response: web.StreamResponse, dialect: Dialect, refusal: Refusal
) -> web.StreamResponse:
    """End a response that has begun; not a model's, which ends its stream itself."""
    if response.content_type != NDJSON:
        if request.transport is not None:
            request.transport.abort()
        return response
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await response.write(refusal_bytes(dialect, refusal) + b"\n")
            await response.write_eof()
    return response


def _http_error(dialect: Dialect, error: web.HTTPException, request: str) -> web.Response:
    """Convert an exception of aiohttp to a response in the dialect."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        methods = ", ".join(sorted(error.allowed_methods))
        message = f"method {error.method} is not allowed; use {methods}"
        response = json_response_of(dialect, 405, message, request)
        response.headers["Allow"] = methods
        return response
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return json_response_of(dialect, 413, f"body too large: {error.text}", request)
    return json_response_of(dialect, error.status, error.text or error.reason, request)


def _cross_origin_refusal(request: web.Request, origins: Origins, hosts: Hosts, *, local: bool) -> str:
    """Return why a request that a page of another site may have sent is refused; empty if it is not.

    ``local``: it comes from this machine.
    """
    names = [request.headers["Host"]] if "Host" in request.headers else []
    if not request.raw_path.startswith("/") and request.url.raw_authority:
        # The target is a whole URL, as for proxies: that name counts, too (RFC 9112, 3.2.2).
        names.append(request.url.raw_authority)
    for host in names:
        if not hosts.accepts(host, local=local):
            return f"host {host[:200]} is not allowed; add it to hosts in sollold.toml, [http]"
    for origin in request.headers.getall("Origin", ()):
        if not allowed(origin, request.host, origins.allowed):
            return (
                f"origin {origin[:200]} is not allowed (CORS); add it to cors_origins in sollold.toml, [http]"
            )
    if cross_site(request):
        return "requests from pages of other sites are not allowed"
    return ""


async def _renamed(request: web.Request) -> web.Request | None:
    """Return the request under its `canonical_path`; None if that is the same."""
    path = canonical_path(request.rel_url.raw_path)
    if path == request.rel_url.raw_path:
        return None
    url = request.rel_url.with_path(path, encoded=True).with_query(request.rel_url.query)
    renamed = request.clone(rel_url=url)
    match = await request.app.router.resolve(renamed)
    match.add_app(request.app)
    match.freeze()
    renamed._match_info = match
    return renamed


def json_response_of(dialect: Dialect, status: int, message: str, request: str) -> web.Response:
    """Return an error response in the dialect. ``request``: the request's id."""
    response = json_response(error_object(dialect, status, message, request=request))
    response.set_status(status)
    return response
