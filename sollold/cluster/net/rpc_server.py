"""Server side of the TLS port for nodes (see `sollold.cluster.net.rpc`).

ALPN selects the protocol: calls, tunnel, link, push-pull or admission.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web

from sollold.cluster.net.acceptor import Acceptor, Encryption
from sollold.cluster.net.dialer import keep_watch, socket_address
from sollold.cluster.net.hang_up import quiet_hang_up
from sollold.cluster.net.identity import STRANGERS, Identity, peer_of
from sollold.cluster.net.open_sockets import OpenSockets
from sollold.cluster.net.rpc import PeerError, Workers
from sollold.cluster.net.tunnel_server import TunnelServer, WorkerTunnels
from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.tasks import cancel_and_wait, retrieve_error, start_task
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

T = TypeVar("T")

HTTP, TUNNEL, LINK = "sollold-http", "sollold-tunnel", "sollold-link"
LARGEST = 64 * 1024 * 1024
"""Maximum bytes of a call's request or response body."""
_BACKLOG = 1024
_HANDSHAKE_SECONDS = 5.0
_SHUTDOWN_SECONDS = 2.0

Handler = Callable[[str, Any], Awaitable[object]]
Route = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PortTaken(OSError):
    """A port is used by another program; the message says which port and what to do."""


@dataclass(frozen=True, slots=True)
class CallRefusal:
    """Body of an error response."""

    message: str
    transport: bool


class RpcServer:
    """The server side. Register all handlers, then call `start`.

    Attributes:
        sockets: connections opened by other nodes.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._methods: dict[str, tuple[msgspec.msgpack.Decoder[Any], Handler]] = {}
        self._app = web.Application(client_max_size=LARGEST, middlewares=[quiet_hang_up])
        self._app.router.add_post("/call/{name}", self._call)
        self._runner: web.AppRunner | None = None
        self._server: Acceptor | None = None
        self._context: ssl.SSLContext | None = None
        self._tunnels = WorkerTunnels()
        self._protocols: dict[str, Callable[[str], asyncio.Protocol | None]] = {
            HTTP: self._http,
            TUNNEL: lambda peer: TunnelServer(peer, self._tunnels),
        }
        self._tasks: set[asyncio.Task[object]] = set()
        self._connections: dict[str, list[asyncio.Transport]] = {}
        self.sockets = OpenSockets()
        self.port = 0
        self.name: Callable[[str], str] = str
        """Returns a node's display name by its id."""

    def method(self, name: str, request: type[T], handler: Callable[[str, T], Awaitable[object]]) -> None:
        """Let ``handler(caller_node_id, request)`` serve ``POST /call/<name>``."""
        self._methods[name] = (msgspec.msgpack.Decoder(request), handler)

    def route(self, method: str, path: str, handler: Route) -> None:
        """Add a raw HTTP route; its handler gets the sender from `caller`."""
        self._app.router.add_route(method, path, handler)

    def tunnel(self, workers: Workers) -> None:
        """Set the workers that members' tunnels lead to."""
        self._tunnels.workers = workers

    def speak(self, protocol: str, make: Callable[[str], asyncio.Protocol | None]) -> None:
        """Let ``make(caller)`` return the protocol of connections with the ALPN name ``protocol``.

        ``caller`` is empty for a stranger, with `STRANGERS` only. None closes the connection.
        """
        self._protocols[protocol] = make

    async def start(self, host: str, port: int) -> int:
        """Start to listen; ``port`` 0: any free one. Returns the port.

        Raises:
            PortTaken: the port is in use.
            OSError: listening failed for another reason.
        """
        self._runner = web.AppRunner(
            self._app, handle_signals=False, access_log=None, handler_cancellation=True,
            keepalive_timeout=90, shutdown_timeout=_SHUTDOWN_SECONDS,
        )  # fmt: skip
        await self._runner.setup()
        try:
            listener = bound(socket.SOCK_STREAM, host, port)
            listener.listen(_BACKLOG)
        except OSError:
            await self._runner.cleanup()
            self._runner = None
            raise
        self.port = int(listener.getsockname()[1])
        self._context = self._identity.server_context(tuple(self._protocols))
        self._server = Acceptor(
            [listener],
            lambda: _Handshaken(self._protocol, self._add_connection),
            self._chosen,
            handshake=_HANDSHAKE_SECONDS,
            shutdown=_SHUTDOWN_SECONDS,
        )
        return self.port

    async def _chosen(self, connection: socket.socket, local: bool) -> Encryption:
        self.sockets.watch(connection)
        return Encryption(self._context)

    def change_identity(self) -> None:
        """Use the cluster's changed secret for new connections. Existing ones stay."""
        self._context = self._identity.server_context(tuple(self._protocols))

    async def close(self) -> None:
        """Stop listening, close all connections and cancel all calls."""
        if self._server is not None:
            await self._server.close()
        self._tunnels.close()
        await cancel_and_wait(*self._tasks)
        if self._runner is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * _SHUTDOWN_SECONDS):
                    await self._runner.cleanup()
            self._runner = None
        self._server = None

    def drop_node(self, node: str) -> None:
        """End the tunnels of the dead ``node``."""
        self._tunnels.drop_node(node)

    def cut(self, node: str) -> None:
        """Abort all connections opened by ``node``."""
        for transport in self._connections.pop(node, ()):
            transport.abort()

    def callers(self) -> frozenset[str]:
        """Return the nodes that have opened connections."""
        return frozenset(self._connections)

    def _add_connection(self, peer: str, transport: asyncio.Transport) -> None:
        """Register a connection opened by ``peer``."""
        self._connections = {
            node: kept
            for node, transports in self._connections.items()
            if (kept := [entry for entry in transports if not entry.is_closing()])
        }
        self._connections.setdefault(peer, []).append(transport)

    async def answer(self, caller: str, name: str, request: object) -> object:
        """Return the reply of the method ``name`` to a request of its type.

        A started call is completed even if its caller is cancelled: no command is carried out in part.

        Raises:
            PeerError: there is no such method, or it refused or failed, or this node stops.
        """
        task = start_task(self._tasks, self._answer(caller, name, request))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                raise PeerError(self._identity.node, f"{name}: this node stops", transport=False) from None
            task.add_done_callback(retrieve_error)
            raise

    async def _answer(self, caller: str, name: str, request: object) -> object:
        found = self._methods.get(name)
        if found is None:
            raise PeerError(self._identity.node, f"no call is named {name!r} here", transport=True)
        try:
            return await found[1](caller, request)
        except PeerError:
            raise
        except Exception as error:
            log.exception("the call %s of %s failed", name, self.name(caller))
            raise PeerError(
                self._identity.node, f"{name} failed: {error or type(error).__name__}", transport=False
            ) from error

    def _protocol(self, alpn: str | None, peer: str) -> asyncio.Protocol | None:
        make = self._protocols.get(alpn or "")
        if make is None:
            return None
        # A node may have been evicted since its handshake, when its other connections were closed.
        member = peer and peer not in self._identity.refused
        return make(peer) if member or alpn in STRANGERS else None

    def _http(self, peer: str) -> asyncio.Protocol:
        assert self._runner is not None and self._runner.server is not None
        return self._runner.server()

    async def _call(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        found = self._methods.get(name)
        if found is None:
            return _refuse(404, f"no call is named {name!r} here; it may run another release", True)
        try:
            decoded = found[0].decode(await request.read())
        except UNDECODABLE as error:
            return _refuse(400, f"the request to {name} is invalid: {error}", True)
        try:
            reply = await self.answer(caller(request), name, decoded)
        except PeerError as error:
            return _refuse(409, str(error), error.transport)
        return web.Response(body=msgspec.msgpack.encode(reply), content_type="application/msgpack")


def bound(kind: socket.SocketKind, host: str, port: int) -> socket.socket:
    """Return a socket bound to the port for nodes. ``::`` includes IPv4.

    Raises:
        PortTaken: another program uses the port.
        OSError: ``host`` is not an address of this machine.
    """
    name = "TCP" if kind == socket.SOCK_STREAM else "UDP"
    try:
        family, target = socket_address((host, port))
        sock = socket.socket(family, kind)
    except OSError as error:
        raise _listen_error(host, port, name, error) from error
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        sock.setblocking(False)
        sock.bind(target)
    except (OSError, UnicodeError) as error:
        sock.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortTaken(
                error.errno,
                f"port {port}/{name} on {host} (cluster.port, for other nodes) is in use: "
                "another sollold may be running; end it or set another port",
            ) from error
        raise _listen_error(host, port, name, error) from error
    return sock


def _listen_error(host: str, port: int, name: str, error: OSError | UnicodeError) -> OSError:
    why = system_reason(error)
    return OSError(
        getattr(error, "errno", None), f"can't listen on {host} port {port}/{name} (cluster.host): {why}"
    )


class _Handshaken(asyncio.Protocol):
    """Passes a connection to the protocol selected by ALPN, after its handshake."""

    def __init__(
        self,
        choose: Callable[[str | None, str], asyncio.Protocol | None],
        entered: Callable[[str, asyncio.Transport], None],
    ) -> None:
        self._choose = choose
        self._add_connection = entered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("ssl_object")
        peer = peer_of(connection)
        protocol = self._choose(connection.selected_alpn_protocol(), peer)
        if protocol is None:
            transport.abort()
            return
        if peer:
            self._add_connection(peer, transport)
        keep_watch(transport)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def caller(request: web.Request) -> str:
    """Return the authenticated node id of the sender of ``request``, to a raw route."""
    return peer_of(request.get_extra_info("ssl_object"))


def _refuse(status: int, message: str, transport: bool) -> web.Response:
    body = msgspec.msgpack.encode(CallRefusal(message, transport))
    return web.Response(status=status, body=body, content_type="application/msgpack")
