"""Calls between nodes: the contract. One TLS port (11436) carries them, by ALPN.

``sollold-http``: peer calls and streams (HTTP/1.1 inside TLS, both sides proved members).
``sollold-tunnel``: layers on their way to a worker.  ``sollold-link``: the standing link that tells a
death within a second.  ``sollold-sync``: push-pull of whole states.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from aiohttp import ClientResponse, web

from sollold.cluster.net.gate import Gate
from sollold.cluster.net.http_connection import HttpConnection

T = TypeVar("T")


class PeerError(Exception):
    """A peer could not be reached, refused, or broke off. ``transport``: nothing was done for sure."""

    def __init__(self, node: str, message: str, *, transport: bool) -> None:
        super().__init__(message)
        self.node = node
        self.transport = transport


class PeerCalls(Protocol):
    """The calling side."""

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        """Send a dataclass, get a dataclass (msgpack, validated). To oneself: no network.

        A request may arrive twice: it is sent again when a connection that was kept turns out to be broken.

        Raises:
            PeerError: with ``transport`` when the node could not be asked. Without, at once, when it is found
                dead or leaves while it is asked.
        """
        ...

    def stream(
        self,
        node: str,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        data: Any = None,
        connect_timeout: float = 3.0,
        idle_timeout: float = 60.0,
    ) -> AbstractAsyncContextManager[ClientResponse]:
        """An HTTP exchange with a node's peer port whose body is streamed either way."""
        ...

    async def connect(self, node: str, *, timeout: float) -> HttpConnection:
        """A connection to a node's peer port for one exchange; `release` it. ``timeout``: seconds.

        Raises:
            PeerError: the node could not be reached.
        """
        ...

    def release(self, connection: HttpConnection) -> None:
        """The exchange is over, or given up."""
        ...


class Workers(Protocol):
    """The workers of a node, for the tunnels that lead to them."""

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Host and port of a worker, for ``caller``, which TLS has proved.

        ``plain``: the address of an external worker; empty: the one started for the deployment.

        Raises:
            PeerError: there is none, or not for the caller.
        """
        ...

    def gate(self, deployment: str) -> Gate | None:
        """What looks at the bytes for the deployment's own worker, if anything."""
        ...

    async def connected(self, deployment: str) -> bool:
        """A tunnel has connected to the deployment's own worker: whether it is the only client.

        If not, the worker was started again, and its address is to be asked for anew.
        """
        ...


class PeerServer(Protocol):
    """The answering side; parts register with it before it starts."""

    def method(self, name: str, request: type[T], handler: Callable[[str, T], Awaitable[object]]) -> None:
        """``handler(caller_node_id, request)`` answers ``POST /call/<name>``."""
        ...

    def route(
        self, method: str, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> None:
        """A raw HTTP route; `sollold.cluster.net.rpc_server.caller` tells who asks."""
        ...

    def tunnel(self, workers: Workers) -> None:
        """``workers``: where members' tunnels lead to."""
        ...
