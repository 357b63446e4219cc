"""Peer servers and peer calls without a cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from sollold.cluster.net.rpc import PeerError, Workers
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from tests.http_double import HttpDouble

T = TypeVar("T")


class FakeServer(RpcServer):
    """Collects registered methods and routes; serves the routes over HTTP if started.

    Attributes:
        asked: number of HTTP requests received.
        fault: awaited before each HTTP request is handled.
    """

    def __init__(self) -> None:
        self.methods: dict[str, tuple[type[Any], Callable[[str, Any], Awaitable[object]]]] = {}
        self.routes: list[tuple[str, str, Any]] = []
        self.url = ""
        self.asked = 0
        self.fault: Callable[[web.Request], Awaitable[None]] | None = None
        self._double = HttpDouble()

    def method(self, name: str, request: type[Any], handler: Callable[[str, Any], Awaitable[object]]) -> None:
        self.methods[name] = (request, handler)

    def route(self, method: str, path: str, handler: Any) -> None:
        self.routes.append((method, path, handler))

    def tunnel(self, workers: Workers) -> None:
        raise NotImplementedError

    async def serve(self) -> None:
        """Serve the routes on loopback until `close`."""
        app = web.Application(middlewares=[self._faults])
        for method, path, handler in self.routes:
            app.router.add_route(method, path, handler)
        self.url = await self._double.serve(app)

    async def close(self) -> None:
        await self._double.close()
        self.url = ""

    @web.middleware
    async def _faults(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked += 1
        if self.fault is not None:
            await self.fault(request)
        answer: web.StreamResponse = await handler(request)
        return answer


class FakeCalls(RpcClient):
    """Calls to the fake servers of other nodes, with requests and replies encoded as msgpack.

    Attributes:
        cut: ids of nodes that can't be reached.
        made: node and method of each call.
    """

    def __init__(self, me: str, servers: dict[str, FakeServer]) -> None:
        self.me = me
        self.servers = servers
        self.cut: set[str] = set()
        self.made: list[tuple[str, str]] = []

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        self.made.append((node, method))
        await asyncio.sleep(0)
        if node in self.cut or node not in self.servers:
            raise PeerError(node, f"node {node} could not be reached", transport=True)
        kind, handler = self.servers[node].methods[method]
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=kind)
        answer = await handler(self.me, decoded)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=reply)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        node: str,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        **_: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if node in self.cut or not self.servers[node].url:
            raise PeerError(node, f"node {node} could not be reached", transport=True)
        url = self.servers[node].url + path
        try:
            async with aiohttp.ClientSession() as session:
                async with session.request(method, url, headers=headers, data=data) as answer:
                    yield answer
        except aiohttp.ClientError as error:
            raise PeerError(node, f"node {node} broke off: {error}", transport=False) from error
