"""Test doubles for the API's dependencies: a scripted service, a fixed library and a one-node cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sollold.api.http.services import AppServices
from sollold.cluster.gossip.record import Backend, Endpoint, Placed, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.pour import Pour, pushed
from sollold.cluster.net.rpc import PeerError
from sollold.control.activity import Activity
from sollold.control.cluster import ClusterService, Planned, Scored
from sollold.control.local_models import NameOverrides
from sollold.control.logs import LogService, NodeLog
from sollold.control.models import ModelService, Running
from sollold.control.monitor import Monitor
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Dropped
from sollold.machine.device import Device, Kind
from sollold.machine.external_worker import ExternalState, ExternalWorker
from sollold.machine.gpus import GpuLoad
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.serving.request import Answer, Ask, Call, Engine, Routing, Waiting
from sollold.subscribers import Subscribers

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": "demo", "prompt": "a"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "demo", "prompt": "a"},
    "/v1/responses": {"model": "demo", "input": "a"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}
"""Route that generates text → its shortest valid request."""

TRUSTED_PROXIES = ("127.0.0.1",)
"""Trust the tests' own address as a proxy."""
REMOTE = {"X-Forwarded-For": "192.168.1.77"}
"""Headers of a request from another machine, forwarded by a trusted proxy."""


def model(name: str = "demo:latest", **changes: Any) -> Model:
    facts: dict[str, Any] = {
        "name": name,
        "digest": "a" * 64,
        "source": "demo",
        "files": ("/models/demo.gguf",),
        "size": 1000,
        "modified": 1_700_000_000.0,
        "architecture": "llama",
        "layers": 4,
        "parameters": 8_030_261_248,
        "quantization": "Q4_K_M",
        "context_train": 4096,
        "capabilities": ("completion",),
    }
    return Model(**{**facts, **changes})


def singly(events: AsyncIterator[bytes]) -> Pour[list[bytes]]:
    """The events as an `Answer` has them, each in a list of its own."""

    async def batches() -> AsyncIterator[list[bytes]]:
        async for event in events:
            yield [event]

    return pushed(batches())


class PlainLibrary(ModelService):
    """A library with fixed models."""

    def __init__(self, *models: Model) -> None:
        self.all = {known.name: Listed(known, ("alpha", "beta")) for known in models}
        self.loaded: tuple[Running, ...] = ()
        self.header: dict[str, Any] = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
        self.files: list[str] = []
        self.copied: list[tuple[str, str, tuple[str, ...]]] = []
        self.deleted: list[tuple[str, tuple[str, ...]]] = []
        self.told: NameOverrides | None = None

    async def models(self) -> tuple[Listed, ...]:
        return tuple(self.all.values())

    async def find(self, name: str) -> Listed:
        found = self.all.get(name) or self.all.get(f"{name}:latest")
        if found is None:
            raise Refusal(Fault.NOT_FOUND, f"model '{name}' not found")
        return found

    def node_names(self, listed: Listed) -> list[str]:
        return list(listed.nodes)

    async def add_file(self, path: str) -> str:
        self.files.append(path)
        return "demo"

    async def metadata(self, listed: Listed, *, whole: bool = False) -> dict[str, Any]:
        return self.header

    def running(self) -> tuple[Running, ...]:
        return self.loaded

    async def copy(
        self, source: str, destination: str, nodes: Sequence[str] = (), told: NameOverrides | None = None
    ) -> None:
        await self.find(source)
        self.told = told
        self.copied.append((source, destination, tuple(nodes)))

    async def delete(self, name: str, nodes: Sequence[str] = ()) -> None:
        await self.find(name)
        self.deleted.append((name, tuple(nodes)))


@dataclass(frozen=True)
class Resumed:
    """An event for `ScriptedService`: the answer was resumed on another engine."""

    gap_ms: float


class ScriptedService:
    """Plays its events as every answer.

    An exception is raised, a number is slept (seconds), an `asyncio.Event` is awaited, and a `Waiting` or
    `Resumed` is reported. Everything else is an event of the answer.
    """

    def __init__(self, *events: Any, engine: Engine = Engine.LLAMA) -> None:
        self.events = events
        self.engine = engine
        self.asks: list[Ask] = []
        self.refusal: Refusal | None = None
        self.gate: asyncio.Event | None = None
        self.waitings: list[Waiting] = []
        self.cancelled = 0
        self.closed = 0

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        self.asks.append(ask)
        for waiting in self.waitings:
            on_wait(waiting)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.refusal is not None:
            raise self.refusal
        self.routing = routing(self.engine)
        self.on_wait = on_wait
        return Answer(self.routing, singly(self._play()), self._close)

    async def _close(self) -> None:
        self.closed += 1

    async def _play(self) -> AsyncIterator[bytes]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, (int, float)):
                await asyncio.sleep(event)
                continue
            if isinstance(event, asyncio.Event):
                await event.wait()
                continue
            if isinstance(event, Waiting):
                self.on_wait(event)
                continue
            if isinstance(event, Resumed):
                self.routing.resumed += 1
                self.routing.gap_ms += event.gap_ms
                continue
            yield event if isinstance(event, bytes) else msgspec.json.encode(event)


def routing(engine: Engine = Engine.LLAMA) -> Routing:
    return Routing(
        backend=Backend.SHARDED if engine is Engine.LLAMA else Backend.OLLAMA,
        engine=engine,
        model="demo:latest",
        node="beta",
        coordinator_url="http://10.0.0.1:11435",
        devices=("alpha/CPU", "beta/CPU"),
        load_ms=12.0,
        queue_ms=3.0,
    )


def chunk(content: str | None = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk of a chat completion, as llama-server sends it."""
    message = {**({"content": content} if content is not None else {}), **delta}
    return {
        "choices": [{"finish_reason": finish, "index": 0, "delta": message}],
        "created": 1,
        "id": "chatcmpl-1",
        "model": "demo:latest",
        "object": "chat.completion.chunk",
    }


def text_service(text: str = "a") -> ScriptedService:
    """A service whose answers are ``text``."""
    return ScriptedService(chunk(text), chunk(finish="stop"), usage_chunk())


def usage_chunk(prompt: int = 7, completion: int = 2) -> dict[str, Any]:
    return {
        "choices": [],
        "created": 1,
        "id": "chatcmpl-1",
        "model": "demo:latest",
        "object": "chat.completion.chunk",
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "timings": {
            "cache_n": 0,
            "prompt_n": prompt,
            "prompt_ms": 10.5,
            "predicted_n": completion,
            "predicted_ms": 20.25,
        },
    }


def record(node: str = "0" * 16, name: str = "alpha", **changes: Any) -> Record:
    facts: dict[str, Any] = {
        "node": node,
        "name": name,
        "version": 1,
        "addresses": ("10.0.0.1",),
        "http_port": 11435,
        "peer_port": 11436,
        "release": "0.1.0",
        "build": "b11434",
        "devices": (Device("CPU", Kind.CPU, "processor", 1000, 900, 800, 100, 700),),
        "endpoints": (endpoint(),),
    }
    return Record(**{**facts, **changes})


def endpoint(**changes: Any) -> Endpoint:
    facts: dict[str, Any] = {
        "id": "d1",
        "model": "demo:latest",
        "digest": "a" * 64,
        "backend": Backend.SHARDED,
        "state": State.READY,
        "context": 2048,
        "slots": 2,
        "bytes": 1000,
        "layers": 4,
        "expires": 300.0,
        "placed": (Placed("0" * 16, "CPU", 0, 2, 400), Placed("1" * 16, "CUDA0", 2, 5, 600)),
    }
    return Endpoint(**{**facts, **changes})


class PlainLogs(LogService):
    """Logs with one engine per model; the text only states the requested number of lines."""

    def __init__(self) -> None:
        pass

    async def tail(self, model: str, lines: int) -> tuple[NodeLog, ...]:
        return (NodeLog(f"{model}-1", "alpha", "llama-server", f"{lines} lines"),)


class PlainCluster(ClusterService):
    """A cluster with fixed records; it appends each request to ``asked``."""

    def __init__(self, *records: Record) -> None:
        self.records = records or (record(),)
        self.asked: list[Any] = []
        self._subscribers = Subscribers("the cluster")
        self.planned = Planned(True, plan={"model": "demo:latest", "shares": []})
        self.leads = True
        """Whether the first node is the leader; otherwise there is none."""
        self.refusal: Refusal | None = None
        """Raised by each change (load, unload, drain)."""

    @property
    def me(self) -> Record:
        return self.records[0]

    def live(self) -> tuple[Record, ...]:
        return self.records

    def record(self, node: str) -> Record | None:
        return next((record for record in self.records if record.node == node), None)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    def change(self, *records: Record) -> None:
        """Replace the records and call the subscribers."""
        self.records = records
        self._subscribers.notify()

    def update_me(self, **changes: Any) -> None:
        self.change(replace(self.me, **changes), *self.records[1:])

    def leader(self) -> Term:
        return Term(3, self.records[0].node) if self.leads else Term()

    async def use_external(self, addresses: Sequence[str]) -> None:
        self.asked.append(("external", tuple(addresses)))

    async def plan(
        self, ask: Any, *, online: bool = False, permit: Callable[[], None] = lambda: None
    ) -> Planned:
        self.asked.append(ask)
        return self.planned

    async def load(self, ask: Any) -> tuple[Record, Endpoint]:
        self.asked.append(ask)
        self._refuse()
        return self.records[0], self.records[0].endpoints[0]

    async def unload(self, model: str, *, force: bool) -> Dropped:
        self.asked.append(("unload", model, force))
        self._refuse()
        return Dropped(ended=("d1",), forgotten=force)

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def scan(self) -> tuple[ExternalWorker, ...]:
        self.asked.append(("scan",))
        return (ExternalWorker("10.0.0.9:50052", ExternalState.USABLE, "", "7.0.0", 1, 1 << 30),)

    async def drain(self, node: str, *, on: bool) -> None:
        self.asked.append(("drain", node, on))
        self._refuse()

    async def scores(self, model: str) -> tuple[Scored, ...]:
        return (Scored("d1", "alpha", 0.9, "ready, nothing in line"),)


class ScriptedPuller:
    """Plays the progress messages of a pull; an exception is raised."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps

    async def pull(self, name: str, *, insecure: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            yield step


class PlainRelayed:
    """A fixed answer of Ollama; an exception among the pieces is raised."""

    def __init__(self, *pieces: bytes | Exception, status: int = 200, kind: str = "application/json") -> None:
        self.pieces = pieces
        self.status = status
        self.kind = kind
        self.closed = 0
        self.gate = asyncio.Event()
        """Awaited after the pieces if ``hangs`` is set."""
        self.hangs = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece
        if self.hangs:
            await self.gate.wait()

    async def close(self) -> None:
        self.closed += 1


class ScriptedRelay:
    """Gives one answer and records each request as (method, path, body, model)."""

    def __init__(self, answer: PlainRelayed) -> None:
        self.answer = answer
        self.sent: list[tuple[str, str, bytes, str]] = []

    async def forward(
        self, method: str, path: str, body: AsyncIterator[bytes] | bytes, model: str = ""
    ) -> PlainRelayed:
        raw = body if isinstance(body, bytes) else b"".join([piece async for piece in body])
        self.sent.append((method, path, raw, model))
        return self.answer


class NoPeers:
    """RPC that reaches only the own node."""

    def __init__(self) -> None:
        self.methods: dict[str, Any] = {}

    def method(self, name: str, request: type, handler: Any) -> None:
        self.methods[name] = handler

    async def call(self, node: str, method: str, request: Any, reply: type, *, timeout: float) -> Any:
        if node != "0" * 16:
            raise PeerError(node, "nobody is there", transport=True)
        return await self.methods[method](node, request)


def monitor_of(
    cluster: Any,
    left: Callable[[str], bool] = lambda _: False,
    gpus: Callable[[], list[GpuLoad]] | None = None,
) -> Monitor:
    """A monitor that is not started."""
    calls: Any = NoPeers()
    monitor = Monitor(cluster, calls, Activity(), left, gpus)
    monitor.register(calls)
    return monitor


def parts(service: Any = None, *models: Model, **more: Any) -> AppServices:
    cluster = more.pop("cluster", None) or PlainCluster()
    return AppServices(
        service=service or ScriptedService(),
        library=more.pop("library", None) or PlainLibrary(*(models or (model(),))),
        cluster=cluster,
        monitor=more.pop("monitor", None) or monitor_of(cluster),
        logs=more.pop("logs", None) or PlainLogs(),
        **more,
    )


def call_of(service: ScriptedService, engine: Engine = Engine.LLAMA) -> Call:
    """The call for ``engine`` in the last request."""
    return service.asks[-1].calls[engine]
