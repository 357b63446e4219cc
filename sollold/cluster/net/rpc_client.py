"""Calls to other nodes (`sollold.cluster.net.rpc` has the contract)."""

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
from sollold.cluster.net.rpc_server import HTTP, LARGEST, CallRefusal, Peers

T = TypeVar("T")

CONNECT_SECONDS = 3.0
_IDLE_SECONDS = 30.0
"""An unused connection is closed after that, before the other side does."""


_ATTEMPTS = 3
"""A cable that was cut breaks all kept connections to a node, and each shows it only when it is used."""


class _Stale(PeerError):
    """The connection was no good before it was used, as one that was kept from an earlier exchange."""


class _Use:
    """How one exchange is made. ``kept``: over a connection of an earlier one."""

    kept = False


class Calls:
    """The calling side.

    Args:
        reach: knows where nodes are, and proves who we are.
        own: answers calls to oneself.
    """

    def __init__(self, reach: Dialer, own: Peers) -> None:
        self._reach = reach
        self._own = own
        self._session: aiohttp.ClientSession | None = None
        self._streams: dict[str, set[ClientResponse]] = {}
        self._asked: dict[str, set[asyncio.Timeout]] = {}
        """Exchanges that no answer has begun to come for."""
        self._connections = KeptConnections(_IDLE_SECONDS)
        """Those that `connect` makes."""

    async def close(self) -> None:
        """End every connection."""
        self._connections.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def drop_node(self, node: str) -> None:
        """``node`` is dead: what is asked of it or read from it ends now instead of after a time-out."""
        for response in tuple(self._streams.get(node, ())):
            _abort(response)
        self._connections.close(lambda key: bool(key[0] == node))
        now = asyncio.get_running_loop().time()
        for asked in self._asked.pop(node, ()):
            asked.reschedule(now)

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        """Send a dataclass, get a dataclass (msgpack, validated). To oneself: no network.

        A request may arrive twice: it is sent again when a connection that was kept turns out to be broken.

        Raises:
            PeerError: with ``transport`` when the node could not be asked. Without, at once, when it is found
                dead or leaves while it is asked.
        """
        try:
            async with asyncio.timeout(timeout):
                if node == self._reach.node:
                    # The reply is the handler's own object: both ends are the same program.
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
        except msgspec.DecodeError as error:
            what = f"the answer of {self._reach.name(node)} to {method} (status {status})"
            raise PeerError(node, f"{what} was not understood: {error}", transport=False) from error

    async def _post(self, node: str, method: str, data: bytes, timeout: float) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connect = min(CONNECT_SECONDS, timeout)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with self.stream(
                    node, "POST", f"/call/{method}", data=data, idle_timeout=timeout, connect_timeout=connect
                ) as response:
                    return response.status, await self._read(response, node)
            except _Stale:
                if attempt == _ATTEMPTS:
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
        """An HTTP exchange with a node's peer port whose body is streamed either way.

        Raises:
            PeerError: the node could not be reached (``transport``), or it broke off, also while the body
                is read within the block.
        """
        return self._stream(node, method, path, headers or {}, data, connect_timeout, idle_timeout)

    async def connect(self, node: str, *, timeout: float = CONNECT_SECONDS) -> HttpConnection:
        """A connection to a node's peer port for one exchange; `release` it.

        Raises:
            PeerError: the node could not be reached.
        """
        # A connection that proved another secret is not used again.
        key = node, self._reach.context(HTTP)
        if (kept := self._connections.take_idle(key)) is not None:
            return kept
        async with self._until_dropped(node):
            made, _, _ = await self._reach.connect(
                node, HTTP, lambda: HttpConnection(tls_name(node)), timeout=timeout
            )
        self._connections.add(key, made)
        return made

    def release(self, connection: HttpConnection) -> None:
        """The exchange is over, or given up."""
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
        use, begun = _Use(), False
        try:
            async with self._until_dropped(node):
                response = await session.request(
                    method,
                    URL(f"https://{tls_name(node)}{path}"),
                    headers={"Accept-Encoding": "identity", **headers},
                    data=data,
                    allow_redirects=False,
                    # With each request: a connection that proved another secret is not used again.
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
                begun = True
                with _among(self._streams, node, response):
                    yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            cause = _cause(error)
            # The race for the quickest address can close its winner: that says nothing of the node.
            lost = isinstance(cause, OSError) and cause.errno == errno.EBADF
            raise (_Stale if lost else PeerError)(
                node, f"{self._reach.name(node)} could not be reached: {in_words(cause)}", transport=True
            ) from error
        except aiohttp.ClientError as error:
            what = str(error) or type(error).__name__
            kind = _Stale if use.kept and not begun else PeerError
            raise kind(node, f"{self._reach.name(node)} broke off: {what}", transport=False) from error

    @asynccontextmanager
    async def _until_dropped(self, node: str) -> AsyncIterator[None]:
        """The block ends when the node is dropped.

        Raises:
            PeerError: it was.
        """
        dropped = asyncio.timeout(None)
        try:
            with _among(self._asked, node, dropped):
                async with dropped:
                    yield
        except TimeoutError:
            if not dropped.expired():
                raise
            # It may be done all the same.
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

    def _socket(self, found: AddrInfoType) -> socket.socket:
        family, kind, protocol = found[:3]
        raw = socket.socket(family, kind, protocol)
        self._reach.sockets.watch(raw)
        return raw

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_ById(self._reach), use_dns_cache=False, limit=0, keepalive_timeout=_IDLE_SECONDS,
                happy_eyeballs_delay=HEAD_START, socket_factory=self._socket,
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
def _among(all_: dict[str, set[T]], node: str, one: T) -> Iterator[None]:
    """``one`` is among those of ``node`` within the block."""
    mine = all_.setdefault(node, set())
    mine.add(one)
    try:
        yield
    finally:
        mine.discard(one)
        if not mine and all_.get(node) is mine:
            del all_[node]


async def _note_kept(session: aiohttp.ClientSession, context: SimpleNamespace, told: object) -> None:
    context.trace_request_ctx.kept = True


class _ById(AbstractResolver):
    """Node ids instead of host names."""

    def __init__(self, reach: Dialer) -> None:
        self._reach = reach

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = self._reach.addresses(host.removesuffix(tls_name("")))
        if not found:
            raise OSError("no address of it is known")
        return [
            ResolveResult(
                hostname=host, host=ip, port=at, proto=socket.IPPROTO_TCP,
                family=socket.AF_INET6 if ":" in ip else socket.AF_INET, flags=socket.AI_NUMERICHOST,
            )
            for ip, at in found
        ]  # fmt: skip

    async def close(self) -> None:
        """Nothing is held."""


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
