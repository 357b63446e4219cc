"""Agents of several nodes in one process with the real llama.cpp; calls between them are Python calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web

from sollold.agent.agent import Agent
from sollold.cluster.gossip.record import Endpoint, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError, Workers
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.splice import Traffic
from sollold.engines.commands import Deploy, Done, Reserve, Reserved
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp import tunnel
from sollold.machine.devices import DeviceMeter
from sollold.models.footprint.run_options import Run
from sollold.models.model import Model
from sollold.models.stores.header_reader import HeaderReader
from sollold.placement.plan import Plan, Share
from sollold.settings.paths import Places
from sollold.settings.schema import MIB, LlamaSettings, NodeSettings, ServingSettings, Settings
from tests.doubles import FakeView, World, until

T = TypeVar("T")
TERM = Term(1, "l")
MISSING_LLAMA = Llama(Path("/nowhere/llama-server"), Path("/nowhere/ggml-rpc-server"), "b1", frozenset())
"""For agents that load no model."""


class Server(RpcServer):
    """Records the registered handlers."""

    def __init__(self) -> None:
        self.methods: dict[str, Callable[[str, Any], Awaitable[object]]] = {}
        self.routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {}

    def method(self, name: str, request: type, handler: Callable[[str, Any], Awaitable[object]]) -> None:
        self.methods[name] = handler

    def route(self, method: str, path: str, handler: Any) -> None:
        self.routes[path] = handler

    def tunnel(self, workers: Workers) -> None:
        self.workers = workers


@dataclass
class Tunnel(tunnel.Tunnel):
    port: int
    on_break: Callable[[str], None]
    open: bool = True
    traffic: Traffic = field(default_factory=Traffic)

    async def close(self) -> None:
        self.open = False


class AgentCluster:
    """All nodes. ``cut`` has the (from, to) pairs whose calls fail, ``dead`` the nodes that the others
    consider dead."""

    def __init__(self, folder: Path, llama: Llama) -> None:
        self.folder = folder
        self.llama = llama
        self.agents: dict[str, Agent] = {}
        self.servers: dict[str, Server] = {}
        self.world = World()
        self.world.leader = TERM
        self.views: dict[str, FakeView] = {}
        self.models: dict[str, Model] = {}
        self.tunnels: list[Tunnel] = []
        self.dead = self.world.dead
        self.cut: set[tuple[str, str]] = set()

    async def add(
        self,
        node: str,
        *,
        limit: int = 2000 * MIB,
        llama: LlamaSettings | None = None,
        serving: ServingSettings | None = None,
    ) -> Agent:
        settings = Settings(
            node=NodeSettings(memory_limit=limit),
            llama=llama or LlamaSettings(worker_port=0, server_port=0, threads=1, extra_args=("-lv", "5")),
            serving=serving or ServingSettings(),
        )
        places = Places(self.folder / node / "state", self.folder / node / "cache")
        await asyncio.to_thread(places.make)
        machine = await asyncio.to_thread(DeviceMeter, settings.node, self.folder)
        me = Record(node, f"pc-{node}", 1, ("127.0.0.1",), 1, 2, "test")
        view, server = FakeView(me, self.world), Server()
        agent = Agent(
            settings,
            places,
            machine,
            view,
            Calls(self, node),
            Tunnels(self, node),
            self.models.get,
            lambda digest: (),
            HeaderReader(lambda: None).header,
            lambda node, digest: pytest.fail("no node has files of models"),
        )
        agent.register(server)
        self.agents[node], self.servers[node], self.views[node] = agent, server, view
        await agent.start()
        await agent.use_llama(self.llama)
        return agent

    def drains(self, node: str, on: bool = True) -> None:
        """Start or end the drain of ``node``, and publish it to all nodes."""
        self.views[node].update_me(draining=on)

    async def call(self, caller: str, node: str, method: str, request: object) -> Any:
        if {(caller, node), (caller, "*"), ("*", node)} & self.cut or node not in self.servers:
            raise PeerError(node, f"{node} can't be reached", transport=True)
        return await self.servers[node].methods[method](caller, request)

    async def reserve(self, deployment: str, plan: Plan) -> list[Reserved]:
        return [
            await self.call("l", node, "reserve", Reserve(TERM, deployment, plan.head, sizes))
            for node, sizes in sorted(plan.bytes_by_owner().items())
        ]

    async def deploy(self, deployment: str, plan: Plan, keep_alive: float = -1.0) -> Done:
        for reserved in await self.reserve(deployment, plan):
            assert reserved.ok, reserved.reason
        done = await self.call("l", plan.head, "deploy", Deploy(TERM, deployment, plan, keep_alive))
        assert isinstance(done, Done)
        return done

    async def until(self, node: str, deployment: str, *states: State, seconds: float = 30.0) -> Endpoint:
        """Wait until the endpoint in the node's record is in one of ``states``; return it."""
        found: list[Endpoint] = []

        def in_state() -> bool:
            found[:] = [endpoint for endpoint in self.views[node].me.endpoints if endpoint.id == deployment]
            return bool(found) and found[0].state in states

        await until(in_state, seconds, lambda: f"{deployment} is {found}")
        return found[0]

    async def close(self) -> None:
        for agent in self.agents.values():
            await agent.shutdown()


class Calls(RpcClient):
    def __init__(self, cluster: AgentCluster, node: str) -> None:
        self._cluster, self._node = cluster, node

    async def call(self, node: str, method: str, request: object, reply: type[T], *, timeout: float) -> T:
        try:
            async with asyncio.timeout(timeout):
                answer = await self._cluster.call(self._node, node, method, request)
        except TimeoutError as error:
            raise PeerError(node, f"no answer within {timeout} s", transport=False) from error
        assert isinstance(answer, reply)
        return answer

    def stream(self, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError


class Tunnels(tunnel.Tunnels):
    """Connects directly to the worker, since all nodes are on this machine."""

    def __init__(self, cluster: AgentCluster, node: str) -> None:
        self._cluster, self._node = cluster, node

    async def open(
        self,
        deployment: str,
        node: str,
        on_break: Callable[[str], None] = lambda reason: None,
        external: str = "",
    ) -> Tunnel:
        _, port = await self._cluster.servers[node].workers.address(self._node, deployment, external)
        self._cluster.tunnels.append(Tunnel(port, on_break))
        return self._cluster.tunnels[-1]


def plan(model: Model, head: str, *counts: tuple[str, int], size: int = 40 * MIB, context: int = 512) -> Plan:
    """``counts``: (node, number of layers) for the CPU workers; the head gets the remaining layers."""
    total = model.layers + 1
    first = total - sum(layers for _, layers in counts)
    shares = []
    start = first
    for node, layers in counts:
        shares.append(Share(node, "CPU", start, start + layers, size, 0, 0))
        start += layers
    host = Share(head, "CPU", 0, first, size, 0, 0)
    run = Run(context=context, slots=1, batch=128, ubatch=128)
    return Plan(model.name, model.digest, head, model.layers, run, host, tuple(shares))


@contextlib.asynccontextmanager
async def running_agents(folder: Path, llama: Llama, *nodes: str) -> AsyncIterator[AgentCluster]:
    cluster = AgentCluster(folder, llama)
    try:
        for node in nodes:
            await cluster.add(node)
        yield cluster
    finally:
        await cluster.close()
