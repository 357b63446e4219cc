"""Builds the HTTP application from its services, and serves it on a port."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError

from sollold.api.anthropic.routes import AnthropicRoutes
from sollold.api.cluster.admission_routes import AdmissionRoutes
from sollold.api.cluster.batch import BatchRoutes
from sollold.api.cluster.description import DescriptionRoute
from sollold.api.cluster.keys_routes import KeyRoutes
from sollold.api.cluster.metrics import Metrics
from sollold.api.cluster.monitor_routes import MonitorRoutes
from sollold.api.cluster.routes import ClusterRoutes
from sollold.api.dashboard import DashboardRoutes
from sollold.api.engine.tolerant import TolerantService
from sollold.api.http.access import ACCESS, Access
from sollold.api.http.answer_budget import AnswerBudget
from sollold.api.http.body import LONGEST_BODY, note_expectation
from sollold.api.http.client_address import networks
from sollold.api.http.connections import (
    LONGEST_HEADER,
    PIECE,
    ClientConnection,
    Connections,
    connection_limit,
)
from sollold.api.http.cors import EXPOSED, METHODS, ORIGINS, Origins, allowed
from sollold.api.http.exchange import exchange_of
from sollold.api.http.guard import Guard
from sollold.api.http.hosts import HOSTS, Hosts
from sollold.api.http.inflight import InflightRequests
from sollold.api.http.request_log import REQUEST_LOG, RequestLog, ResponseCounts
from sollold.api.http.response import KeepAlive, ResponseContext
from sollold.api.http.route import Route
from sollold.api.http.secure_server import secure_server
from sollold.api.http.server_tls import ServerTls
from sollold.api.http.services import AppServices
from sollold.api.ollama.model_routes import OllamaModelRoutes
from sollold.api.ollama.routes import OllamaRoutes
from sollold.api.openai.responses_routes import ResponsesRoutes
from sollold.api.openai.routes import OpenAiRoutes
from sollold.cluster.net.acceptor import Acceptor
from sollold.cluster.net.hang_up import quiet_hang_up
from sollold.cluster.net.pieces import sendable
from sollold.cluster.net.rpc_server import PortTaken
from sollold.errors import system_reason
from sollold.serving.batch import Batches
from sollold.serving.byte_budget import ByteBudget
from sollold.settings.schema import GIB, HttpSettings

log = logging.getLogger("sollold.api")

_BACKLOG = 1024


def all_routes(
    services: AppServices, context: ResponseContext, metrics: Metrics, batches: Batches
) -> list[Route]:
    """Return all routes of the API, including its description."""
    rows = DashboardRoutes().routes()
    rows += OllamaRoutes(services, context).routes()
    rows += OllamaModelRoutes(services).routes()
    rows += OpenAiRoutes(services, context).routes()
    rows += ResponsesRoutes(services, context).routes()
    rows += AnthropicRoutes(services, context).routes()
    rows += ClusterRoutes(services, context.inflight).routes()
    rows += MonitorRoutes(services, context.inflight).routes()
    if services.admission is not None:
        rows += AdmissionRoutes(services.admission).routes()
    rows += KeyRoutes(services).routes()
    rows += BatchRoutes(services, batches, context.inflight).routes()
    rows += metrics.routes()
    rows.append(DescriptionRoute(rows).route())
    return rows


def build_app(
    services: AppServices,
    settings: HttpSettings,
    keepalive: KeepAlive | None = None,
    bodies: int = GIB,
    requests_logged: str = "inference",
) -> web.Application:
    """Build the application; its batches end with it (`on_cleanup`). Its `ORIGINS`, `HOSTS`, `ACCESS` and
    `REQUEST_LOG` may be changed later.

    ``bodies``: maximum bytes of all request bodies in progress, and of large answers; 0 for no limit.
    ``requests_logged``: the mode of `RequestLog`.
    """
    inflight = InflightRequests(services.monitor.activity)
    requests = RequestLog(requests_logged)
    answers = ResponseCounts()
    metrics = Metrics(services, answers, requests.usage)
    batches = Batches()
    context = ResponseContext(TolerantService(services.service), keepalive or KeepAlive(), inflight)
    rows = all_routes(services, context, metrics, batches)
    origins = Origins(settings.cors_origins)
    access = Access(settings.auth, services.keys, services.passes)
    access.proxies = networks(settings.trusted_proxies)
    hosts = Hosts(settings.hosts, lambda: [node.name for node in services.cluster.live()])
    guard = Guard(origins, hosts, access, answers, requests, ByteBudget(bodies), AnswerBudget(bodies))
    app = web.Application(
        middlewares=[quiet_hang_up, guard.middleware()],
        client_max_size=LONGEST_BODY,
    )
    app[ORIGINS] = origins
    app[HOSTS] = hosts
    app[ACCESS] = access
    app[REQUEST_LOG] = requests
    for row in rows:
        for method in row.methods:
            app.router.add_route(method, row.path, row.handler, expect_handler=note_expectation)
            if row.path.startswith("/api/"):
                # For Ollama clients that were given a base URL ending in /v1.
                app.router.add_route(method, "/v1" + row.path, row.handler, expect_handler=note_expectation)

    async def end_batches(_: web.Application) -> None:
        await batches.close()

    app.on_cleanup.append(end_batches)
    app.on_response_prepare.append(_stamp(origins))
    return app


def _stamp(origins: Origins) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        exchange = exchange_of(request)
        exchange.begun = response
        if isinstance(response, web.Response) and isinstance(response.body, (bytes, bytearray)):
            # For all routes, since any response may be large.
            response.body = sendable(response.body)
        # Without chunks the response ends with the connection, also if the caller requested keep-alive.
        is_endless = request.version < HttpVersion11 and response.content_length is None
        # What a client sends that waits to send its body may be the body or another request.
        if is_endless or exchange.waits:
            response.force_close()
            response.headers["Connection"] = "close"
        response.headers["X-Request-Id"] = exchange.id
        if "anthropic-version" in request.headers:
            # Anthropic's clients read it by this name, and print it with errors.
            response.headers["request-id"] = exchange.id
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        origin = request.headers.get("Origin")
        if origin is None:
            return
        response.headers["Vary"] = "Origin"
        if allowed(origin, request.host, origins.allowed):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED
            if request.method == "OPTIONS":
                requested = request.headers.get("Access-Control-Request-Headers", "")
                response.headers["Access-Control-Allow-Methods"] = METHODS
                response.headers["Access-Control-Allow-Headers"] = requested or "Authorization, Content-Type"
                response.headers["Access-Control-Max-Age"] = "600"

    return stamp


def _is_own_error(record: logging.LogRecord) -> bool:
    """Whether to log an error: not malformed HTTP, which is answered with 400, nor a caller's hang-up."""
    senders = HttpProcessingError | web.RequestPayloadError | ConnectionError
    return not (record.exc_info and isinstance(record.exc_info[1], senders))


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> OSError:
    """Return an error with the system's message, which the loop wraps in a sentence of its own."""
    number = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(number) if number and number > 0 else system_reason(error)
    return OSError(number, f"can't listen on {host} port {port} (http.host, http.port): {reason}")


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on the address; for ``::`` one that accepts IPv4 as well.

    Raises:
        OSError: the address can't be bound.
    """
    if host == "::" and socket.has_dualstack_ipv6():
        dual_stack = socket.create_server(
            (host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
        )
        dual_stack.setblocking(False)
        return [dual_stack]
    loop = asyncio.get_running_loop()
    addresses = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(addresses):
            sockets.append(socket.create_server(address[:2], family=family, backlog=_BACKLOG))
            sockets[-1].setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class Listener:
    """Serves the application on a port. A caller's hang-up cancels its handler."""

    def __init__(
        self,
        app: web.Application,
        settings: HttpSettings,
        *,
        drain: float = 60.0,
        tls: ServerTls | None = None,
    ) -> None:
        """``drain``: seconds for running requests to finish at `close`; ``tls``: None: HTTP only."""
        self._settings = settings
        self._tls = tls
        logger = logging.getLogger("sollold.http")
        logger.addFilter(_is_own_error)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            # Bodies are decompressed when they are read (`decompressed`), without blocking the loop.
            auto_decompress=False,
            # Limits the bytes that wait to be read, and their chunks to a sixteenth of that.
            read_bufsize=2 * PIECE,
            logger=logger,
            shutdown_timeout=drain,
            keepalive_timeout=75.0,
            max_line_size=LONGEST_HEADER,
            max_field_size=LONGEST_HEADER,
        )
        self._connections = Connections(connection_limit())
        self._servers: list[asyncio.Server] = []
        self._acceptor: Acceptor | None = None
        self.port = settings.port

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            PortTaken: another program uses the port.
            OSError: ``http.host`` is not an address of this machine, or the port may not be bound.
        """
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            sockets = await _listen(host, port)
        except (OSError, UnicodeError) as error:
            await self._runner.cleanup()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    error.errno,
                    f"port {port} on {host} (http.port, the HTTP API) is in use: "
                    "another sollold may be running; stop it or set another port",
                ) from error
            raise _cannot_listen(host, port, error) from error
        self.port = int(sockets[-1].getsockname()[1])
        if self._tls is not None:
            required = self._settings.requires_tls
            self._acceptor = secure_server(
                sockets, self._connection, self._tls.context_now, required=required
            )
            return
        loop = asyncio.get_running_loop()
        for sock in sockets:
            self._servers.append(await loop.create_server(self._connection, sock=sock, backlog=_BACKLOG))

    async def close(self) -> None:
        """Accept no new requests, let the running ones finish within the limit, then abort them."""
        for server in self._servers:
            server.close()
        if self._acceptor is not None:
            await self._acceptor.close()
        await self._runner.cleanup()
        self._connections.abort_all()

    def _connection(self) -> asyncio.BaseProtocol:
        assert self._runner.server is not None
        return ClientConnection(self._runner.server, self._connections)
