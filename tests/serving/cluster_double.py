"""Stand-ins for what serving stands on: the view, the engines, the peer calls, the loader, the names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import aiohttp
from aiohttp import web

from sollold.agent.deployment import Work
from sollold.cluster.peer import PeerError
from sollold.cluster.record import Backend, Endpoint, Record, State
from sollold.cluster.term import Term
from sollold.config import HttpSettings, ServingSettings
from sollold.models.library import Listed
from sollold.models.model import Model
from sollold.models.names import Resolved
from sollold.serving.ask import Ask, Call, Engine, Waiting
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.loader import Need, Ready
from sollold.serving.router import Router
from sollold.serving.service import Serving
from tests.serving.reciter import Reciter

MODEL = "reciter:latest"


class World:
    """All nodes' records, shared: gossip without delay."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.dead: set[str] = set()
        self.callbacks: list[Callable[[], None]] = []
        self.leader = Term(1, "a")

    def changed(self) -> None:
        for callback in tuple(self.callbacks):
            callback()


class FakeView:
    def __init__(self, world: World, node: str) -> None:
        self._world = world
        self._node = node
        world.records[node] = Record(node, f"host-{node}", 1, ("127.0.0.1",), 11435, 11436, "0")

    @property
    def me(self) -> Record:
        return self._world.records[self._node]

    def live(self) -> tuple[Record, ...]:
        return tuple(r for n, r in sorted(self._world.records.items()) if n not in self._world.dead)

    def record(self, node: str) -> Record | None:
        return self._world.records.get(node)

    def leader(self) -> Term:
        return self._world.leader

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._world.callbacks.append(callback)
        return lambda: self._world.callbacks.remove(callback)

    def update_me(self, **changes: Any) -> None:
        self._world.records[self._node] = replace(self.me, **changes, version=self.me.version + 1)
        self._world.changed()


class FakeEngines:
    def __init__(self, view: FakeView) -> None:
        self._view = view
        self.urls: dict[str, str] = {}
        self.failed: list[tuple[str, str]] = []
        self.reports: list[tuple[str, int, int, float]] = []
        self.inside = 0
        self.done: Work | None = None
        self.keep_alives: list[float | None] = []

    def endpoint(self, endpoint: str) -> Endpoint | None:
        return next((one for one in self._view.me.endpoints if one.id == endpoint), None)

    def url(self, endpoint: str) -> str | None:
        return self.urls.get(endpoint)

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

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        self.reports.append((endpoint, active, waiting, speed))

    def serve(
        self, id: str, reciter: Reciter, *, slots: int = 4, backend: Backend = Backend.LOCAL, **more: Any
    ) -> None:
        self.urls[id] = reciter.url
        endpoint = Endpoint(id, MODEL, "", backend, State.READY, context=4096, slots=slots, **more)
        self._view.update_me(endpoints=(*self._view.me.endpoints, endpoint))

    def drop(self, id: str) -> None:
        self.urls.pop(id, None)
        self._view.update_me(endpoints=tuple(e for e in self._view.me.endpoints if e.id != id))


class FakePeers:
    """A node's peer server on loopback HTTP, without TLS."""

    def __init__(self) -> None:
        self.app = web.Application(client_max_size=2**30)
        self.url = ""
        self._runner: web.AppRunner | None = None

    def method(self, name: str, request: type[Any], handler: Callable[..., Awaitable[object]]) -> None:
        raise NotImplementedError

    def route(self, method: str, path: str, handler: Callable[..., Awaitable[web.StreamResponse]]) -> None:
        self.app.router.add_route(method, path, handler)

    def tunnel(self, resolve: Callable[[str, str, str], tuple[str, int]]) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        self._runner = web.AppRunner(self.app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


class FakeCalls:
    def __init__(self, name: str, peers: dict[str, FakePeers]) -> None:
        self._name = name
        self._peers = peers
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self.answers: dict[str, Callable[[str, Any], Any]] = {}

    async def call(self, node: str, method: str, request: object, reply: type[Any], *, timeout: float) -> Any:
        if method not in self.answers:
            raise PeerError(node, "no such method", transport=True)
        return self.answers[method](node, request)

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


class FakeLoader:
    """Says what a test's function does; without one, waits for the world to change."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loads = 0
        self.needs: list[Need] = []
        self.dropped: list[str] = []
        self.forward = False
        """Each time that it is asked it is further."""
        self.load: Callable[[], Awaitable[Ready | None]] | None = None

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> Ready | None:
        self.loads += 1
        self.needs.append(need)
        on_wait(Waiting("loading", progress=self.loads / 10 if self.forward else 0.5))
        if self.load is not None:
            return await self.load()
        changed = asyncio.Event()
        self._world.callbacks.append(changed.set)
        try:
            await changed.wait()
        finally:
            self._world.callbacks.remove(changed.set)
        return None

    async def drop(self, wish: Any, reason: str) -> None:
        self.dropped.append(wish.model)


class FakeNames:
    """``late``: names that are known only when all is ``learned``."""

    def __init__(self) -> None:
        self.late: set[str] = set()
        self.learned = asyncio.Event()
        self.size = 0
        """Bytes of the model; 0: its details are not known."""

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

    def get(self, name: str) -> Listed | None:
        return Listed(Model(MODEL, "", "folder", (), self.size, 0.0), ()) if self.size else None


class Node:
    """One node's serving room."""

    def __init__(self, cluster: Cluster, name: str, settings: ServingSettings) -> None:
        self.name = name
        self.view = FakeView(cluster.world, name)
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
    """Nodes a, b, c and engines, all in this process."""

    def __init__(self, settings: ServingSettings | None = None) -> None:
        self.world = World()
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


async def until(condition: Callable[[], object], limit: float = 5.0) -> None:
    """Wait for a condition, not for time."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - any state may be waited for
            await asyncio.sleep(0.005)


_PATHS = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "native": "/completion",
    "ollama": "/api/chat",
    "generate": "/api/generate",
}


def ask(form: str = "chat", *, stream: bool = True, id: str = "r1", **more: Any) -> Ask:
    """A request in one of the engines' forms; keywords that `Ask` has not go into the body."""
    fields = {key: more.pop(key) for key in tuple(more) if key in Ask.__dataclass_fields__}
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
    return Ask(
        **{"id": id, "model": "reciter", "calls": {engine: Call(_PATHS[form], body)}, "stream": stream}
        | fields
    )


def said(events: list[dict[str, Any]]) -> str:
    """The text in a stream's events, of any form."""
    text = ""
    for event in events:
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice.get("message") or {}
            text += delta.get("content") or choice.get("text") or ""
        text += event.get("content") or event.get("response") or ""
        text += (event.get("message") or {}).get("content") or ""
    return re.sub("\0", "", text)
