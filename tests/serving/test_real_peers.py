"""Serving over the real transport between nodes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.router import Router
from sollold.serving.service import Serving
from sollold.settings.schema import HttpSettings, ServingSettings
from tests.doubles import FakeView, World, record, until
from tests.keys import key, key_of
from tests.serving.cluster_double import FakeEngines, FakeLoader, FakeNames, ask, text_of
from tests.serving.reciter import TEXT, Reciter

A, B = key(1).node, key(2).node


class RealNode:
    """A node with real peer connections and doubles for its view and engines."""

    def __init__(self, world: World, node: str, ports: dict[str, int]) -> None:
        identity = Identity(key_of(node), Tokens.read(""))
        self.node = node
        self.ports = ports
        self.view = FakeView(record(node), world)
        self.engines = FakeEngines(self.view)
        self.peers = RpcServer(identity)
        reach = Dialer(identity, lambda other: (("127.0.0.1", ports[other]),) if other in ports else ())
        self.calls = RpcClient(reach, self.peers)
        settings = ServingSettings()
        self.server = EndpointServer(self.view, self.engines, settings, self.peers)
        self.serving = Serving(
            self.view,
            FakeNames(),
            self.calls,
            self.server,
            FakeLoader(world),
            Router(node),
            settings,
            HttpSettings(wait_limit=5.0),
        )

    async def start(self) -> None:
        self.ports[self.node] = await self.peers.start("127.0.0.1", 0)
        await self.server.start()
        await self.serving.start()

    async def stop(self) -> None:
        await self.serving.close()
        await self.server.close()
        await self.calls.close()
        await self.peers.close()


@pytest.fixture
async def nodes() -> AsyncIterator[tuple[RealNode, RealNode, Reciter]]:
    world = World()
    ports: dict[str, int] = {}
    a, b = RealNode(world, A, ports), RealNode(world, B, ports)
    reciter = Reciter()
    for part in (reciter, a, b):
        await part.start()
    b.engines.serve("d1", reciter, slots=1)
    try:
        yield a, b, reciter
    finally:
        for part in (a, b, reciter):
            await part.stop()


async def test_consecutive_answers(nodes: tuple[RealNode, RealNode, Reciter]) -> None:
    a, b, _ = nodes
    for n in range(3):
        answer = await a.serving.open(ask(id=f"r{n}"), lambda _: None)
        events: list[Any] = [json.loads(event) async for event in answer.events]
        assert text_of(events) == TEXT
        assert answer.routing.resumed == 0
    await until(lambda: b.server.under_way == 0)


async def test_closing_the_answer_ends_the_generation(nodes: tuple[RealNode, RealNode, Reciter]) -> None:
    a, b, reciter = nodes
    reciter.pause = 0.01
    answer = await a.serving.open(ask(), lambda _: None)
    assert await anext(answer.events)
    await answer.close()
    await until(lambda: reciter.cancelled == 1 and b.server.under_way == 0)


async def test_killed_engine_is_resumed(nodes: tuple[RealNode, RealNode, Reciter]) -> None:
    a, _, reciter = nodes
    reciter.pause = 0.001
    reciter.die_after = 60
    answer = await a.serving.open(ask(), lambda _: None)
    events = [json.loads(event) async for event in answer.events]
    assert text_of(events) == TEXT
    assert answer.routing.resumed == 1
