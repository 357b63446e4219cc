"""Client side of calls between nodes (see `sollold.cluster.net.rpc`)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import AddrInfoType, ClientResponse
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sollold.cluster.net.dialer import HEAD_START, Dialer, in_words
from sollold.cluster.net.http_connection import HttpConnection, KeptConnections
from sollold.cluster.net.identity import tls_name
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import HTTP, LARGEST, CallRefusal, RpcServer
from sollold.undecodable import UNDECODABLE

T = TypeVar("T")

CONNECT_SECONDS = 3.0
_IDLE_SECONDS = 30.0
"""Seconds after which an idle connection is closed, before the other side does."""


_MAX_ATTEMPTS = 3
"""Attempts per call: a cut cable breaks all idle connections to a node, and each shows it only when used."""


class _Stale(PeerError):
    """The connection was broken before it was used, for example one kept from an earlier exchange."""


class _Use:
    """State of one exchange. ``kept``: it reuses an earlier connection."""

    kept = False


class RpcClient:
    """The client side of calls.

    Args:
        reach: connects to nodes and authenticates this one.
        own: handles calls to this node itself.
    """

    def __init__(self, reach: Dialer, own: RpcServer) -> None:
        self._reach = reach
        self._own = own
        self._session: aiohttp.ClientSession | None = None
        self._streams: dict[str, set[ClientResponse]] = {}
        self._unanswered: dict[str, set[asyncio.Timeout]] = {}
        """Timeouts of exchanges without any response yet."""
        self._connections = KeptConnections(_IDLE_SECONDS)
        """Connections made by `connect`."""

    async def close(self) -> None:
        """Close all connections."""
        self._connections.close()
        # Calls made meanwhile need a new session.
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def drop_node(self, node: str) -> None:
        """End all exchanges with the dead ``node`` now instead of after a timeout."""
        for response in tuple(self._streams.get(node, ())):
            _abort(response)
        self._connections.close(lambda key: bool(key[0] == node))
        now = asyncio.get_running_loop().time()
        for pending in self._unanswered.pop(node, ()):
            pending.reschedule(now)

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        """Send a dataclass, return a dataclass (msgpack, validated). Calls to oneself use no network.

        A request may arrive twice: it is sent again if a kept connection turns out to be broken.

        Raises:
            PeerError: with ``transport`` if the request was certainly not sent. Without, immediately, if the
                node is declared dead or leaves during the call.
        """
        try:
            async with asyncio.timeout(timeout):
                if node == self._reach.node:
                    # The handler's own object is returned: both ends are the same program.
                    return await self._own.answer(node, method, request)  # type: ignore[return-value]
                status, body = await self._post(node, method, msgspec.msgpack.encode(request), timeout)
        except TimeoutError:
            raise PeerError(
                node,
                f"{self._reach.name(node)} did not answer {method} within {timeout:g} s",
                transport=False,
            ) from None
        try:
            if status != 200:
                refusal = msgspec.msgpack.decode(body, type=CallRefusal)
                raise PeerError(node, refusal.message, transport=refusal.transport)
            return msgspec.msgpack.decode(body, type=reply)
        except UNDECODABLE as error:
            subject = f"the answer of {self._reach.name(node)} to {method} (status {status})"
            raise PeerError(node, f"{subject} is invalid: {error}", transport=False) from error

    async def _post(self, node: str, method: str, data: bytes, timeout: float) -> tuple[int, bytes]:
        """Send a call; return status and body of the response."""
        connect = min(CONNECT_SECONDS, timeout)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                async with self.stream(
                    node, "POST", f"/call/{method}", data=data, idle_timeout=timeout, connect_timeout=connect
                ) as response:
                    return response.status, await self._read(response, node)
            except _Stale:
                if attempt == _MAX_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def stream(
        self,
        node: str,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        data: Any = None,
        connect_timeout: float = CONNECT_SECONDS,
        idle_timeout: float = 60.0,
    ) -> AbstractAsyncContextManager[ClientResponse]:
        """Start an HTTP exchange with a node's peer port; both bodies can be streamed.

        Raises:
            PeerError: the node could not be reached (``transport``), or disconnected, even while the body
                is read within the block.
        """
        return self._stream(node, method, path, headers or {}, data, connect_timeout, idle_timeout)

    async def connect(self, node: str, *, timeout: float = CONNECT_SECONDS) -> HttpConnection:
        """Return a connection to a node's peer port for one exchange; `release` it afterwards.

        Raises:
            PeerError: the node could not be reached.
        """
        # Connections authenticated by another token are not reused.
        key = node, self._reach.context(HTTP)
        if (kept := self._connections.take_idle(key)) is not None:
            return kept
        async with self._until_dropped(node):
            connection, _, _ = await self._reach.connect(
                node, HTTP, lambda: HttpConnection(tls_name(node)), timeout=timeout
            )
        self._connections.add(key, connection)
        return connection

    def release(self, connection: HttpConnection) -> None:
        """Return a connection after its exchange ended or was given up."""
        self._connections.release(connection)

    @asynccontextmanager
    async def _stream(
        self,
        node: str,
        method: str,
        path: str,
        headers: dict[str, str],
        data: Any,
        connect_timeout: float,
        idle_timeout: float,
    ) -> AsyncIterator[ClientResponse]:
        session = self._opened()
        use, responded = _Use(), False
        try:
            async with self._until_dropped(node):
                response = await session.request(
                    method,
                    URL(f"https://{tls_name(node)}{path}"),
                    headers={"Accept-Encoding": "identity", **headers},
                    data=data,
                    allow_redirects=False,
                    # With each request: connections authenticated by another token are not reused.
                    ssl=self._reach.context(HTTP),
                    trace_request_ctx=use,
                    timeout=aiohttp.ClientTimeout(
                        total=None,
                        connect=connect_timeout,
                        sock_connect=connect_timeout,
                        sock_read=idle_timeout,
                    ),
                )
            async with response:
                responded = True
                with _tracked(self._streams, node, response):
                    yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            cause = _cause(error)
            # The race for the fastest address can close its winner: that says nothing about the node.
            lost = isinstance(cause, OSError) and cause.errno == errno.EBADF
            raise (_Stale if lost else PeerError)(
                node, f"{self._reach.name(node)} could not be reached: {in_words(cause)}", transport=True
            ) from error
        except aiohttp.ClientError as error:
            why = f"the connection to {self._reach.name(node)} broke: {str(error) or type(error).__name__}"
            kind = _Stale if use.kept and not responded else PeerError
            raise kind(node, why, transport=False) from error

    @asynccontextmanager
    async def _until_dropped(self, node: str) -> AsyncIterator[None]:
        """End the block when the node is dropped.

        Raises:
            PeerError: it was dropped.
        """
        dropped = asyncio.timeout(None)
        try:
            with _tracked(self._unanswered, node, dropped):
                async with dropped:
                    yield
        except TimeoutError:
            if not dropped.expired():
                raise
            # The request may be carried out all the same.
            raise PeerError(node, f"{self._reach.name(node)} is gone", transport=False) from None

    async def _read(self, response: ClientResponse, node: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > LARGEST:
                _abort(response)
                why = f"{self._reach.name(node)} answered with more than {LARGEST} bytes"
                raise PeerError(node, why, transport=False)
            parts.append(part)
        return b"".join(parts)

    def _socket(self, info: AddrInfoType) -> socket.socket:
        family, kind, protocol = info[:3]
        raw = socket.socket(family, kind, protocol)
        self._reach.sockets.watch(raw)
        return raw

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_IdResolver(self._reach), use_dns_cache=False, limit=0,
                keepalive_timeout=_IDLE_SECONDS, happy_eyeballs_delay=HEAD_START, socket_factory=self._socket,
            )  # fmt: skip
            tracing = aiohttp.TraceConfig()
            tracing.on_connection_reuseconn.append(_note_kept)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trace_configs=[tracing],
            )
        return self._session


@contextlib.contextmanager
def _tracked(table: dict[str, set[T]], node: str, item: T) -> Iterator[None]:
    """Keep ``item`` in the set of ``node`` within the block."""
    items = table.setdefault(node, set())
    items.add(item)
    try:
        yield
    finally:
        items.discard(item)
        if not items and table.get(node) is items:
            del table[node]


async def _note_kept(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    context.trace_request_ctx.kept = True


class _IdResolver(AbstractResolver):
    """Resolves node ids instead of host names."""

    def __init__(self, reach: Dialer) -> None:
        self._reach = reach

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = self._reach.addresses(host.removesuffix(tls_name("")))
        if not found:
            raise OSError("its address is unknown")
        return [
            ResolveResult(
                hostname=host, host=ip, port=peer_port, proto=socket.IPPROTO_TCP,
                family=socket.AF_INET6 if ":" in ip else socket.AF_INET, flags=socket.AI_NUMERICHOST,
            )
            for ip, peer_port in found
        ]  # fmt: skip

    async def close(self) -> None:
        """Do nothing: no resources are held."""


def _abort(response: ClientResponse) -> None:
    connection = response.connection
    if connection is not None and connection.transport is not None:
        with contextlib.suppress(RuntimeError):
            connection.transport.abort()


def _cause(error: aiohttp.ClientError) -> BaseException:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return error.certificate_error
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error
    return TimeoutError()
