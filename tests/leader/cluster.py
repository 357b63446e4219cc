"""A simulated cluster for tests of the leader: owners with real ledgers, heads that load nothing."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sollold.agent.ledger import Ledger
from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.record import Backend, Drafts, Endpoint, Placed, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import Commit, Deploy, Done, Release, Reserve, Reserved, Unload
from sollold.leader.absent_nodes import BACK_WITHIN
from sollold.leader.leader import Leader
from sollold.leader.messages import Ensure, Verdict
from sollold.machine.device import Device, Kind
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.vocabulary import compatible
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.models.names import Resolved, resolve
from sollold.settings.schema import ModelSettings, PlacementSettings, Settings
from sollold.subscribers import Subscribers
from tests.doubles import until
from tests.placement.fleets import MIB, shape

T = TypeVar("T")


def cpu_device(room: int, bandwidth: float = 20e9) -> Device:
    return Device("CPU", Kind.CPU, "cpu", room, room, room, 0, room, 30 * MIB, bandwidth, 0.2e12)


def model(name: str = "demo:latest", digest: str = "d1", **changes: Any) -> Model:
    default = Model(
        name=name,
        digest=digest,
        source="folder",
        files=(f"/models/{name}.gguf",),
        size=820 * MIB,
        modified=0.0,
        architecture="llama",
        layers=16,
        parameters=400_000_000,
        context_train=32768,
        capabilities=("completion",),
    )
    return replace(default, **changes)


@dataclass
class Node:
    """An owner and head with a real ledger."""

    cluster: Cluster
    id: str
    devices: tuple[Device, ...]
    models: list[Model] = field(default_factory=list)
    build: str = "b1"
    name: str = ""
    ledger: Ledger = field(default_factory=lambda: Ledger(ready=True))
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    deploys: list[Deploy] = field(default_factory=list)
    unreachable: bool = False
    hook: Callable[[str, object], Awaitable[object | None]] | None = None
    draining: bool = False
    empty: bool = False
    hidden: bool = False
    """Changes are not published: its record stays as it was."""
    published: Record | None = None

    def record(self) -> Record:
        if self.hidden and self.published is not None:
            return self.published
        self.published = Record(
            node=self.id,
            name=self.name or f"host-{self.id}",
            version=1,
            addresses=("127.0.0.1",),
            http_port=1,
            peer_port=2,
            release="0",
            build=self.build,
            devices=self.ledger.devices(),
            grants=self.ledger.grants(),
            endpoints=tuple(self.endpoints.values()),
            draining=self.draining,
            empty=self.empty,
        )
        return self.published

    async def answer(self, method: str, request: object) -> object:
        if self.hook is not None:
            answer = await self.hook(method, request)
            if answer is not None:
                return answer
        now = self.cluster.now
        match request:
            case Reserve():
                return self.ledger.reserve(request, now)[0]
            case Release():
                done = self.ledger.release(request, "leader", now)[0]
                self.ledger.ended(request.deployment)
                return done
            case Deploy():
                return self.deploy(request)
            case Unload():
                return self.unload(request)
        raise PeerError(self.id, f"{self.id} does not answer {method}", transport=False)

    def deploy(self, request: Deploy) -> Done:
        plan = request.plan
        for node, wanted in plan.bytes_by_owner().items():
            owner = self.cluster.nodes[node].ledger
            done, _ = owner.commit(
                Commit(request.deployment, self.id, tuple(d for d in wanted if wanted[d]), self.build),
                self.cluster.now,
            )
            assert done.ok, done.reason
        self.deploys.append(request)
        self.endpoints[request.deployment] = Endpoint(
            id=request.deployment,
            model=plan.model,
            digest=plan.digest,
            backend=Backend.SHARDED if plan.shares else Backend.LOCAL,
            state=State.LOADING,
            context=plan.run.context // plan.run.slots,
            slots=plan.run.slots,
            placed=tuple(Placed(s.node, s.device, s.first, s.last, s.total) for s in plan.shares),
            bytes=sum(sum(devices.values()) for devices in plan.bytes_by_owner().values()),
            layers=plan.layers,
            embedding=plan.run.embedding,
            asked=plan.asked,
            drafts=Drafts(plan.drafts_by, plan.run.drafts, digest=plan.draft_digest),
        )
        self.cluster.changed()
        return Done(True)

    def unload(self, request: Unload) -> Done:
        endpoint = self.endpoints.get(request.deployment)
        if endpoint is None:
            return Done(True)
        if request.when_idle:
            self.endpoints[request.deployment] = replace(endpoint, closing=True)
            self.cluster.changed()
            return Done(True)
        if endpoint.active and not request.force:
            return Done(False, "there are requests in it")
        del self.endpoints[request.deployment]
        for node in self.cluster.nodes.values():
            node.ledger.end_deployment(request.deployment, "unloaded")
            node.ledger.ended(request.deployment)
        self.cluster.changed()
        return Done(True)


class Cluster(RpcClient, Library):
    """The view, calls and library of a leader on node ``a``."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.nodes: dict[str, Node] = {}
        self.settings = settings or Settings()
        self.term = Term(1, "a")
        self.now = 100.0
        self.here = "a"
        self._subscribers = Subscribers("the cluster")
        self.calls_made: list[tuple[str, str, object]] = []
        self.shapes: dict[str, Shape] = {"d1": shape()}
        self.planner = Leader(self.settings, self, self, self, clock=lambda: self.now)

    def add(self, id: str, room: int, *models: Model, devices: tuple[Device, ...] = ()) -> Node:
        node = Node(self, id, devices or (cpu_device(room),), list(models))
        node.ledger.measured(MeasuredMemory(tuple(node.devices)))
        self.nodes[id] = node
        return node

    def changed(self) -> None:
        self._subscribers.notify()

    def ready(self, deployment: str, **changes: Any) -> None:
        """Make a deployment ready, with other ``changes`` of its endpoint."""
        for node in self.nodes.values():
            if deployment in node.endpoints:
                node.endpoints[deployment] = replace(
                    node.endpoints[deployment], **{"state": State.READY, **changes}
                )
        self.changed()

    def granted(self) -> int:
        return sum(grant.bytes for node in self.nodes.values() for grant in node.ledger.grants())

    def seen_by(self, node: str) -> Cluster:
        """The same cluster from the view of another node."""
        other = copy.copy(self)
        other.here = node
        return other

    # View

    @property
    def me(self) -> Record:
        return self.nodes[self.here].record()

    def live(self) -> tuple[Record, ...]:
        return tuple(node.record() for _, node in sorted(self.nodes.items()))

    def record(self, node: str) -> Record | None:
        return self.nodes[node].record() if node in self.nodes else None

    def leader(self) -> Term:
        return self.term

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    def update_me(self, **changes: Any) -> None:
        raise AssertionError("the leader must not change the record")

    # Calls

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        self.calls_made.append((node, method, request))
        await asyncio.sleep(0)
        callee = self.nodes.get(node)
        if callee is None or callee.unreachable:
            raise PeerError(node, f"node {node} does not answer", transport=True)
        answering = asyncio.ensure_future(callee.answer(method, request))
        gone = asyncio.Event()
        unsubscribe = self.subscribe(lambda: None if node in self.nodes else gone.set())
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise PeerError(node, f"node {node} is gone", transport=False)
            answer = answering.result()
        finally:
            unsubscribe()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        assert isinstance(answer, reply)
        return answer

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not used")

    # Library

    def resolve(self, name: str) -> Resolved:
        return resolve(name, {m.name for node in self.nodes.values() for m in node.models})

    def find(self, name: str) -> tuple[tuple[str, Model], ...]:
        found = self.resolve(name).name
        return tuple(
            (node.id, model) for node in self.nodes.values() for model in node.models if model.name == found
        )

    def all(self) -> tuple[Listed, ...]:
        names = sorted({model.name for node in self.nodes.values() for model in node.models})
        return tuple(Listed(found[0][1], tuple(n for n, _ in found)) for found in map(self.find, names))

    def nodes_with(self, digest: str) -> tuple[str, ...]:
        return tuple(n.id for n in self.nodes.values() if any(m.digest == digest for m in n.models))

    def with_vocabulary(self, vocabulary: str) -> tuple[tuple[tuple[str, Model], ...], ...]:
        names = {model.name for node in self.nodes.values() for model in node.models}
        return tuple(
            found
            for name in sorted(names)
            if compatible((found := self.find(name))[0][1].vocabulary, vocabulary)
        )

    async def shape(self, node: str, model: Model) -> Shape:
        if model.digest not in self.shapes:
            raise LookupError("its header can't be read")
        return self.shapes[model.digest]

    # Requests of the leader

    def requests(self, method: str) -> list[tuple[str, object]]:
        return [(node, request) for node, name, request in self.calls_made if name == method]


def refuse(reason: str, **available: int) -> Callable[[str, object], Awaitable[object | None]]:
    """A hook that refuses reservations."""

    async def hook(method: str, request: object) -> object | None:
        return Reserved(False, reason, dict(available)) if method == "reserve" else None

    return hook


SETTINGS = Settings(
    placement=PlacementSettings(context=2048, slots=1),
    # No file transfers.
    models=ModelSettings(fetch_seconds=0),
)
ENSURE = Ensure("demo")


async def load(cluster: Cluster, ask: Ensure = ENSURE, **changes: Any) -> str:
    answer = await cluster.planner.ensure(ask)
    assert answer.verdict is Verdict.WAIT, answer
    cluster.ready(answer.deployment, **changes)
    return answer.deployment


async def let_leader_look(cluster: Cluster, seconds: float) -> None:
    """Advance the clock, and wait until the leader has run a whole periodic check at the new time."""
    cluster.now += seconds
    cluster.changed()
    policy = cluster.planner._replica_policy
    observe, checks = policy.observe, 0

    def counting_observe(records: Iterable[Record], now: float) -> list[tuple[str, str, bool]]:
        nonlocal checks
        checks += 1
        return observe(records, now)

    policy.observe = counting_observe  # type: ignore[method-assign]
    try:
        # A check begins with this call: the second one follows the end of the first.
        await until(lambda: checks >= 2)
    finally:
        policy.observe = observe  # type: ignore[method-assign]


def remove_for_good(cluster: Cluster, node: str) -> None:
    """Remove a node and let the time pass for which the leader waits for it."""
    del cluster.nodes[node]
    cluster.changed()
    cluster.now += BACK_WITHIN
    cluster.changed()


def fail_deployment(cluster: Cluster, deployment: str, **changes: Any) -> None:
    """Let a deployment fail, and release its memory."""
    cluster.ready(deployment, **{"state": State.FAILED, "reason": "a worker is gone"} | changes)
    for node in cluster.nodes.values():
        node.endpoints.pop(deployment, None)
        node.ledger.end_deployment(deployment, "failed")
        node.ledger.ended(deployment)
    cluster.changed()


def offer_in_ollama(cluster: Cluster, node: str, **changes: Any) -> str:
    """Add the model to the Ollama of a node, by default not loaded; return the endpoint's id."""
    offer = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False)
    cluster.nodes[node].endpoints[offer.id] = replace(offer, **changes)
    return offer.id
