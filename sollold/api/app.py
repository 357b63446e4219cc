"""The HTTP application, built from its parts; and the listener that serves it."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from sollold.api.anthropic import AnthropicRoutes
from sollold.api.batch import BatchRoutes
from sollold.api.body import HELD, let_go
from sollold.api.caller import ID, request_id
from sollold.api.cluster import ClusterRoutes
from sollold.api.cors import EXPOSED, METHODS, ORIGINS, Origins, allowed
from sollold.api.dashboard import DashboardRoutes
from sollold.api.fault_shape import Dialect, error_object
from sollold.api.live import LiveRequests
from sollold.api.metrics import Metrics
from sollold.api.ollama import OllamaRoutes, json_response
from sollold.api.openai import OpenAiRoutes
from sollold.api.openapi import describe
from sollold.api.parts import Parts
from sollold.api.reply import JSON, Desk, Patience, refusal_response
from sollold.api.responses import ResponsesRoutes
from sollold.api.route import Handler, Route
from sollold.cluster.peer_server import PortTaken
from sollold.config import GIB, HttpSettings
from sollold.serving.ask import Refusal
from sollold.serving.batch import Batches
from sollold.serving.held import Held

log = logging.getLogger("sollold.api")

_HUNG_UP = 499
"""What the metrics call a caller that went away; it is never sent."""

_BACKLOG = 1024
LONGEST_BODY = 128 * 1024 * 1024
"""Bytes of a JSON body, images included. Blobs are streamed and not bounded by it."""


def dialect_of(path: str) -> Dialect:
    """Whose errors a path speaks, also where there is no route."""
    if path.startswith("/v1/api/"):
        return Dialect.OLLAMA
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path.startswith("/v1/") or path in (
        "/v1",
        "/tokenize",
        "/detokenize",
        "/infill",
        "/apply-template",
        "/rerank",
    ):
        return Dialect.OPENAI
    return Dialect.OLLAMA


def all_routes(parts: Parts, desk: Desk, metrics: Metrics, batches: Batches) -> list[Route]:
    """Every route of the API, its description included."""
    rows = DashboardRoutes().routes()
    rows += OllamaRoutes(parts, desk).routes()
    rows += OpenAiRoutes(parts, desk).routes()
    rows += ResponsesRoutes(parts, desk).routes()
    rows += AnthropicRoutes(parts, desk).routes()
    rows += ClusterRoutes(parts, desk.live).routes()
    rows += BatchRoutes(parts, batches).routes()
    rows += metrics.routes()
    description: list[bytes] = []

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=description[0], headers={"Content-Type": JSON})

    rows.append(Route("GET", "/openapi.json", openapi, Dialect.OLLAMA, "This description"))
    description.append(msgspec.json.encode(describe(rows)))
    return rows


def build_app(
    parts: Parts, settings: HttpSettings, patience: Patience | None = None, bodies: int = GIB
) -> web.Application:
    """The application; its batches end with it (`on_cleanup`). ``app[ORIGINS]`` may be changed later.

    ``bodies``: bytes of all bodies under way, at the most; 0: no limit.
    """
    live = LiveRequests()
    metrics = Metrics(parts.cluster, live)
    batches = Batches()
    rows = all_routes(parts, Desk(parts.service, patience or Patience(), live), metrics, batches)
    origins = Origins(settings.cors_origins)
    app = web.Application(middlewares=[_guard(origins, metrics)], client_max_size=LONGEST_BODY)
    app[ORIGINS] = origins
    app[HELD] = Held(bodies)
    for row in rows:
        app.router.add_route(row.method, row.path, row.handler)
        if row.path.startswith("/api/"):
            # People who typed a base of /v1 into an Ollama client.
            app.router.add_route(row.method, "/v1" + row.path, row.handler)

    async def end_batches(_: web.Application) -> None:
        await batches.close()

    app.on_cleanup.append(end_batches)
    app.on_response_prepare.append(_stamp(origins))
    return app


def _guard(origins: Origins, metrics: Metrics) -> Middleware:
    """Every error in its dialect's shape; no traceback ever leaves the node; foreign pages are refused."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[ID] = request_id(request)
        dialect = dialect_of(request.path)
        started = time.monotonic()
        status = _HUNG_UP
        try:
            response = await answer(request, handler, dialect)
            status = response.status
            return response
        finally:
            let_go(request)
            metrics.count(dialect, status, started)

    async def answer(request: web.Request, handler: Handler, dialect: Dialect) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and not allowed(origin, request.host, origins.allowed):
            message = (
                f"pages of {origin[:200]} may not ask here; add it to cors_origins in sollold.toml, [http]"
            )
            return json_response_of(dialect, 403, message)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204)
        try:
            return await handler(request)
        except Refusal as refusal:
            log.info(
                "%s %s refused: %s",
                request.method,
                request.path,
                refusal.message,
                extra={"request": request[ID]},
            )
            return refusal_response(dialect, refusal)
        except web.HTTPMethodNotAllowed as error:
            there = ", ".join(sorted(error.allowed_methods))
            response = json_response_of(dialect, 405, f"{request.method} is not allowed here; {there} is")
            response.headers["Allow"] = there
            return response
        except web.HTTPNotFound:
            return json_response_of(
                dialect, 404, f"there is no {request.path[:200]} here; /openapi.json lists what is"
            )
        except web.HTTPRequestEntityTooLarge as error:
            return json_response_of(dialect, 413, f"the body is too long: {error.text}")
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return json_response_of(dialect, error.status, error.text or error.reason)
        except ConnectionError:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path, extra={"request": request[ID]})
            message = "the node failed in a way it did not expect; its log says more, under this request's id"
            return json_response_of(dialect, 500, f"{message} ({request[ID]})")

    return guard


def json_response_of(dialect: Dialect, status: int, message: str) -> web.Response:
    """An error in its dialect's shape."""
    response = json_response(error_object(dialect, status, message))
    response.set_status(status)
    return response


def _stamp(origins: Origins) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Request-Id"] = request.get(ID) or request_id(request)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        origin = request.headers.get("Origin")
        if origin is None:
            return
        response.headers["Vary"] = "Origin"
        if allowed(origin, request.host, origins.allowed):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED
            if request.method == "OPTIONS":
                wanted = request.headers.get("Access-Control-Request-Headers", "")
                response.headers["Access-Control-Allow-Methods"] = METHODS
                response.headers["Access-Control-Allow-Headers"] = wanted or "Authorization, Content-Type"
                response.headers["Access-Control-Max-Age"] = "600"

    return stamp


def _worth_a_line(record: logging.LogRecord) -> bool:
    """What is no HTTP is the sender's fault and answered with 400: no line, let alone a traceback."""
    senders = HttpProcessingError | web.RequestPayloadError
    return not (record.exc_info and isinstance(record.exc_info[1], senders))


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> OSError:
    """In the system's own words; the loop wraps them in a sentence of its own."""
    number = error.errno if isinstance(error, OSError) else None
    why = os.strerror(number) if number and number > 0 else getattr(error, "strerror", "") or str(error)
    return OSError(number, f"can't listen on {host} port {port} (http.host, http.port): {why}")


def _site(runner: web.AppRunner, host: str, port: int) -> web.BaseSite:
    """A server on the address; on ``::`` it takes IPv4 as well.

    Raises:
        OSError: the address can't be listened on.
    """
    if host == "::" and socket.has_dualstack_ipv6():
        made = socket.create_server(
            (host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
        )
        made.setblocking(False)
        return web.SockSite(runner, made, backlog=_BACKLOG)
    return web.TCPSite(runner, host, port, backlog=_BACKLOG)


class Listener:
    """Serves the application on a port. A caller's hang-up cancels its handler."""

    def __init__(self, app: web.Application, settings: HttpSettings, *, drain: float = 60.0) -> None:
        """``drain``: seconds that running answers get when it is closed."""
        self._settings = settings
        logger = logging.getLogger("sollold.http")
        logger.addFilter(_worth_a_line)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            logger=logger,
            shutdown_timeout=drain,
            keepalive_timeout=75.0,
        )
        self.port = settings.port

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            PortTaken: another program has the port.
            OSError: ``http.host`` is no address of this machine, or the port may not be bound.
        """
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            site = _site(self._runner, host, port)
            await site.start()
        except (OSError, UnicodeError) as error:
            await self._runner.cleanup()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    error.errno,
                    f"port {port} on {host} (http.port, for people and programs) is in use: "
                    "another sollold may be running; end it or set another port",
                ) from error
            raise _cannot_listen(host, port, error) from error
        for address in self._runner.addresses:
            self.port = int(address[1])

    async def close(self) -> None:
        """Take no new requests, let the running ones end within the limit, then end them."""
        await self._runner.cleanup()
