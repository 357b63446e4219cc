"""Calls between nodes: the contract. One TLS port (11436) carries them, by ALPN.

``sollold-http``: peer calls and streams (HTTP/1.1 inside TLS, both sides proved members).
``sollold-tunnel``: layers on their way to a worker.  ``sollold-link``: the standing link that tells a
death within a second.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from aiohttp import ClientResponse, web

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


class PeerServer(Protocol):
    """The answering side; parts register with it before it starts."""

    def method(self, name: str, request: type[T], handler: Callable[[str, T], Awaitable[object]]) -> None:
        """``handler(caller_node_id, request)`` answers ``POST /call/<name>``."""
        ...

    def route(
        self, method: str, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> None:
        """A raw HTTP route; `sollold.cluster.peer_server.caller` tells who asks."""
        ...

    def tunnel(self, resolve: Callable[[str, str, str], tuple[str, int]]) -> None:
        """``resolve(caller, deployment, plain)`` gives the worker's host and port, or raises PeerError.

        ``plain``: the address of a worker that others started; empty: the one started for the deployment.
        """
        ...
