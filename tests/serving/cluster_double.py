"""Doubles for serving's dependencies: the view, engines, peer calls, loader and model names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.http_connection import HttpConnection
from sollold.cluster.net.rpc import PeerError, Workers
from sollold.cluster.net.rpc_client import CONNECT_SECONDS, RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.engines.address import EngineAddress
from sollold.engines.llamacpp.participants import Work
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.models.names import Resolved, unresolved
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engines import Engines
from sollold.serving.loader import Loader, Need, Ready
from sollold.serving.request import Ask, Call, Engine, Waiting
from sollold.serving.router import Router
from sollold.serving.service import Serving
from sollold.settings.schema import HttpSettings, ServingSettings
from tests.doubles import FakeView, World, record
from tests.serving.reciter import Reciter

MODEL = "reciter:latest"


class HasUrl(Protocol):
    """An engine that answers at a URL."""

    @property
    def url(self) -> str: ...


class FakeEngines(Engines):
    def __init__(self, view: FakeView) -> None:
        self._view = view
        self.urls: dict[str, str] = {}
        self.failed: list[tuple[str, str]] = []
        self.reports: list[tuple[str, int, int, float]] = []
        self.answers: list[tuple[str, int, int, int]] = []
        self.inside = 0
        self.done: Work | None = None
        self.keep_alives: list[float | None] = []

    def of(self, endpoint: str) -> FakeEngines:
        return self

    def endpoint(self, endpoint: str) -> Endpoint | None:
        return next((candidate for candidate in self._view.me.endpoints if candidate.id == endpoint), None)

    def address(self, endpoint: str) -> EngineAddress | None:
        url = self.urls.get(endpoint)
        return EngineAddress(url) if url is not None else None

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        self.inside += 1
        self.keep_alives.append(keep_alive)
        try:
            yield
        finally:
            self.inside -= 1

    def fail(self, endpoint: str, reason: str) -> None:
        self.failed.append((endpoint, reason))
        self.drop(endpoint)

    def work(self, endpoint: str) -> Work | None:
        return self.done

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        self.answers.append((endpoint, tokens, drafted, accepted))

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        self.reports.append((endpoint, active, waiting, speed))

    def serve(
        self, id: str, engine: HasUrl, *, slots: int = 4, backend: Backend = Backend.LOCAL, **more: Any
    ) -> None:
        self.urls[id] = engine.url
        endpoint = Endpoint(id, MODEL, "", backend, State.READY, context=4096, slots=slots, **more)
        self._view.update_me(endpoints=(*self._view.me.endpoints, endpoint))

    def crash(self, id: str, reason: str = "it was terminated by SIGSEGV") -> None:
        """Report that the engine of deployment ``id`` crashed."""
        self.end(id, reason, crashed=True)

    def end(self, id: str, reason: str, *, crashed: bool = False) -> None:
        """Report that the engine of deployment ``id`` ended by itself."""
        ended: dict[str, Any] = {"state": State.FAILED, "crashed": crashed, "reason": reason}
        endpoints = [
            replace(candidate, **ended) if candidate.id == id else candidate
            for candidate in self._view.me.endpoints
        ]
        self._view.update_me(endpoints=tuple(endpoints))

    def force_out(self, id: str) -> None:
        """Report that deployment ``id`` was unloaded with ``--force`` while it had requests."""
        ended: dict[str, Any] = {"state": State.DRAINING, "forced": True, "reason": "asked for"}
        endpoints = [
            replace(candidate, **ended) if candidate.id == id else candidate
            for candidate in self._view.me.endpoints
        ]
        self._view.update_me(endpoints=tuple(endpoints))

    def drop(self, id: str) -> None:
        self.urls.pop(id, None)
        self._view.update_me(endpoints=tuple(e for e in self._view.me.endpoints if e.id != id))


class FakePeers(RpcServer):
    """A node's peer server on loopback HTTP, without TLS."""

    def __init__(self) -> None:
        self.app = web.Application(client_max_size=2**30)
        self.url = ""
        self._runner: web.AppRunner | None = None

    def method(self, name: str, request: type[Any], handler: Callable[..., Awaitable[object]]) -> None:
        raise NotImplementedError

    def route(self, method: str, path: str, handler: Callable[..., Awaitable[web.StreamResponse]]) -> None:
        self.app.router.add_route(method, path, handler)

    def tunnel(self, workers: Workers) -> None:
        raise NotImplementedError

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        self._runner = web.AppRunner(self.app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.port = int(self._runner.addresses[0][1])
        self.url = f"http://{host}:{self.port}"
        return self.port

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


class FakeConnection(HttpConnection):
    """A connection that names the calling node in a header."""

    caller = ""

    async def ask(self, method: str, path: str, headers: Mapping[str, str], *body: bytes | bytearray) -> int:
        return await super().ask(method, path, {"X-Peer": self.caller, **headers}, *body)


class FakeCalls(RpcClient):
    def __init__(self, name: str, peers: dict[str, FakePeers]) -> None:
        self._name = name
        self._peers = peers
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self.answers: dict[str, Callable[[str, Any], Any]] = {}

    async def call(self, node: str, method: str, request: object, reply: type[Any], *, timeout: float) -> Any:
        if method not in self.answers:
            raise PeerError(node, "no such method", transport=True)
        return self.answers[method](node, request)

    async def connect(self, node: str, *, timeout: float = CONNECT_SECONDS) -> HttpConnection:
        address = urlsplit(self._peers[node].url)
        assert address.hostname is not None and address.port is not None
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: FakeConnection("peer"), address.hostname, address.port
            )
        except OSError as error:
            raise PeerError(node, str(error), transport=True) from error
        made.caller = self._name
        return made

    def release(self, connection: HttpConnection) -> None:
        connection.close()

    @asynccontextmanager
    async def stream(
        self,
        node: str,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        data: Any = None,
        connect_timeout: float = 3.0,
        idle_timeout: float = 60.0,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=idle_timeout)
        headers = {"X-Peer": self._name, **(headers or {})}
        try:
            response = await self.session.request(
                method, self._peers[node].url + path, headers=headers, data=data, timeout=timeout
            )
        except aiohttp.ClientError as error:
            raise PeerError(node, str(error), transport=True) from error
        try:
            yield response
        finally:
            response.close()


class FakeLoader(Loader):
    """Calls the test's `load` function, or waits for a change of the view if there is none."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loads = 0
        self.needs: list[Need] = []
        self.dropped: list[str] = []
        self.forward = False
        """Whether each call reports more progress than the one before."""
        self.load: Callable[[], Awaitable[Ready | None]] | None = None

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> Ready | None:
        self.loads += 1
        self.needs.append(need)
        on_wait(Waiting("loading", progress=self.loads / 10 if self.forward else 0.5))
        if self.load is not None:
            return await self.load()
        changed = asyncio.Event()
        unsubscribe = self._world.subscribers.add(changed.set)
        try:
            await changed.wait()
        finally:
            unsubscribe()
        return None

    async def unload(self, wish: Any, reason: str) -> None:
        self.dropped.append(wish.model)


class FakeNames(Library):
    """Names in ``late`` are resolved only after ``learned`` is set."""

    def __init__(self) -> None:
        self.late: set[str] = set()
        self.learned = asyncio.Event()
        self.size = 0
        """Size of the model in bytes."""
        self.having: set[str] = set()
        """Nodes that have the model."""

    def holders(self, listed: str) -> tuple[tuple[str, Model], ...]:
        return tuple((node, Model(listed, "", "folder", (), self.size, 0.0)) for node in self.having)

    async def awaited(self, name: str) -> Resolved:
        if name in self.late:
            await self.learned.wait()
        if name.split(":")[0] == "reciter":
            return Resolved(name, MODEL)
        if name == "two":
            return Resolved(name, candidates=("two:a", "two:b"))
        if name == "elsewhere":
            return Resolved(name, away=("host-z",))
        return Resolved(name)

    async def named(self, name: str) -> Listed:
        resolved = await self.awaited(name)
        if not resolved.name:
            raise unresolved(resolved)
        return Listed(Model(MODEL, "", "folder", (), self.size, 0.0), ())


class Node:
    """The serving component of one node."""

    def __init__(self, cluster: Cluster, name: str, settings: ServingSettings) -> None:
        self.name = name
        self.view = FakeView(record(name, name=f"host-{name}"), cluster.world)
        self.engines = FakeEngines(self.view)
        self.peers = cluster.peers[name] = FakePeers()
        self.server = EndpointServer(
            self.view, self.engines, settings, self.peers, who=lambda request: request.headers["X-Peer"]
        )
        self.loader = FakeLoader(cluster.world)
        self.router = Router(name)
        self.calls = FakeCalls(name, cluster.peers)
        self.names = FakeNames()
        self.serving = Serving(
            self.view,
            self.names,
            self.calls,
            self.server,
            self.loader,
            self.router,
            settings,
            HttpSettings(wait_limit=5.0),
        )

    async def start(self) -> None:
        await self.peers.start()
        await self.server.start()
        await self.serving.start()

    async def stop(self) -> None:
        await self.serving.close()
        await self.server.close()
        await self.calls.session.close()
        await self.peers.stop()


class Cluster:
    """Nodes and engines in this process."""

    def __init__(self, settings: ServingSettings | None = None) -> None:
        self.world = World()
        self.world.leader = Term(1, "a")
        self.settings = settings or ServingSettings(recover_limit=5.0)
        self.peers: dict[str, FakePeers] = {}
        self.nodes: list[Node] = []
        self.reciters: list[Reciter] = []

    async def node(self, name: str) -> Node:
        node = Node(self, name, self.settings)
        self.nodes.append(node)
        await node.start()
        return node

    async def reciter(self) -> Reciter:
        reciter = Reciter()
        self.reciters.append(reciter)
        await reciter.start()
        return reciter

    async def stop(self) -> None:
        for node in self.nodes:
            await node.stop()
        for reciter in self.reciters:
            await reciter.stop()


_PATHS = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "native": "/completion",
    "ollama": "/api/chat",
    "generate": "/api/generate",
}


def ask(form: str = "chat", *, stream: bool = True, id: str = "r1", **more: Any) -> Ask:
    """A request in one of the engines' formats. Keywords that aren't fields of `Ask` go into the body."""
    fields = {key: more.pop(key) for key in tuple(more) if key in Ask.__struct_fields__}
    body: dict[str, Any] = {"model": "m", "stream": stream}
    if form in ("chat", "ollama"):
        body["messages"] = [{"role": "user", "content": "recite"}]
    else:
        body["prompt"] = "Say: "
    if form == "chat" and stream:
        body["stream_options"] = {"include_usage": True}
    if form == "generate":
        body["raw"] = True
    body |= more
    engine = Engine.OLLAMA if form in ("ollama", "generate") else Engine.LLAMA
    facts: dict[str, Any] = {
        "id": id,
        "model": "reciter",
        "calls": {engine: Call(_PATHS[form], body)},
        "stream": stream,
    }
    return Ask(**facts | fields)


def text_of(events: list[dict[str, Any]]) -> str:
    """Return the concatenated text of a stream's events, in any format."""
    text = ""
    for event in events:
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice.get("message") or {}
            text += delta.get("content") or choice.get("text") or ""
        text += event.get("content") or event.get("response") or ""
        text += (event.get("message") or {}).get("content") or ""
    return re.sub("\0", "", text)
