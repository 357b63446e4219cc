"""A deployment that is ended at any step of its load leaves nothing behind.

The agents, their ledgers and the deployment are real; only the engines' processes are doubles. Nothing waits
for a thread or a clock, so the n-th turn of the loop is the same step in every run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest

from sollold.cluster.gossip.record import GrantState, State
from sollold.engines.commands import Deploy, Lost, Release, Unload
from sollold.engines.llamacpp import llama_server, rpc_worker
from sollold.engines.llamacpp.kept_prompts import KeptPrompts
from sollold.engines.llamacpp.llama_server import Head
from sollold.engines.llamacpp.ports import LOOPBACK
from sollold.models.model import Model
from sollold.models.stores.header_reader import HeaderReader
from tests.agent_cluster import MISSING_LLAMA, TERM, AgentCluster, plan, running_agents
from tests.doubles import until

MODEL = Model("m:latest", "d" * 64, "folder", ("/m.gguf",), 1, 0.0, layers=6)
PLAN = plan(MODEL, "a", ("b", 3), ("a", 2))
STEPS = 40
"""More turns of the loop than a load takes."""


class Engine:
    """A double of `Process`, which lives until it is stopped or `die` is called."""

    running_now: ClassVar[set[Engine]] = set()

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.pid = 0
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._port = int(command[command.index("-p" if name == "worker" else "--port") + 1])
        self.running_now.add(self)

    @classmethod
    async def start(cls, name: str, command: list[str], **more: Any) -> Engine:
        await asyncio.sleep(0)
        return cls(name, command)

    @property
    def running(self) -> bool:
        return not self.exited.done()

    def last_lines(self) -> list[str]:
        return []

    def memory(self) -> int:
        return 0

    def work(self) -> int:
        return 1

    def waits_for_disk(self) -> bool:
        return False

    def addresses(self) -> list[tuple[str, int]]:
        return [(LOOPBACK, self._port)]

    async def stop(self, grace: float = 0.0) -> None:
        await asyncio.sleep(0)
        self.die(-9)

    def die(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)
            self.running_now.discard(self)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    async def to_thread(work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        await asyncio.sleep(0)
        return work(*arguments, **more)

    async def no_header(reader: HeaderReader, model: Model) -> None:
        await asyncio.sleep(0)
        raise OSError("it can't be read")

    async def ready(head: Head, http: aiohttp.ClientSession) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        if not head.process.running:
            raise head.failure()

    async def nothing(*arguments: Any) -> None:
        await asyncio.sleep(0)

    Engine.running_now.clear()
    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    monkeypatch.setattr(HeaderReader, "header", no_header)
    monkeypatch.setattr(Head, "ready", ready)
    for name in ("restore", "save"):
        monkeypatch.setattr(KeptPrompts, name, nothing)
    for module in (llama_server, rpc_worker):
        monkeypatch.setattr(module, "Process", Engine)


async def _end(cluster: AgentCluster) -> None:
    if (deployment := cluster.agents["a"].deployments.all.get("d")) is not None:
        deployment.end("a fault")


async def _kill_worker(cluster: AgentCluster) -> None:
    for engine in [engine for engine in Engine.running_now if engine.name == "worker"]:
        engine.die(-11)


async def _kill_head(cluster: AgentCluster) -> None:
    for engine in [engine for engine in Engine.running_now if engine.name != "worker"]:
        engine.die(1)


async def _release(cluster: AgentCluster) -> None:
    for node in "ab":
        await cluster.call("l", node, "release", Release(TERM, "d", "a"))


async def _unload(cluster: AgentCluster) -> None:
    await cluster.call("l", "a", "unload", Unload(TERM, "d", force=True))


async def _lose(cluster: AgentCluster) -> None:
    await cluster.call("b", "a", "lost", Lost("d", "it is gone", True))


def remains(cluster: AgentCluster) -> str:
    """What is left of the deployment; empty when it is gone."""
    if cluster.agents["a"].deployments._running or Engine.running_now:
        return "it runs"
    for node, agent in cluster.agents.items():
        grants = agent.grants
        if any(grant.state is GrantState.COMMITTED for grant in grants.ledger.grants()):
            return f"memory of {node}"
        if grants._starting or grants._ending or grants._ports._taken or agent._ports._taken:
            return f"a start, an end or a port on {node}"
        if any((cluster.folder / node / "state/engine_keys").glob("*")):
            return f"a key on {node}"
    return ""


@pytest.mark.parametrize("fault", [_end, _kill_worker, _kill_head, _release, _unload, _lose])
async def test_a_load_that_is_ended_at_any_step_leaves_nothing(
    folder: Path, fault: Callable[[AgentCluster], Any]
) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a", "b") as cluster:
        cluster.models[MODEL.digest] = MODEL
        states = set()
        for step in range(STEPS):
            for reserved in await cluster.reserve("d", PLAN):
                assert reserved.ok, reserved.reason
            deploy = asyncio.create_task(cluster.call("l", "a", "deploy", Deploy(TERM, "d", PLAN, -1.0)))
            for _ in range(step):
                await asyncio.sleep(0)
            states |= {endpoint.state for endpoint in cluster.views["a"].me.endpoints}
            await fault(cluster)
            await deploy
            deployments = cluster.agents["a"].deployments
            if (survivor := deployments.all.get("d")) is not None and survivor.alive:
                # The fault came before there was anything to end.
                await _unload(cluster)
            await until(lambda: not remains(cluster), 5, lambda: f"{remains(cluster)} is left")
            await _release(cluster)
            deployments.all.pop("d", None)
        assert states >= {State.STARTING, State.LOADING, State.READY}
