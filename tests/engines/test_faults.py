"""Random faults of real processes must not leave processes, grants or tasks behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import psutil
import pytest
import uvloop
from blockbuster import blockbuster_ctx

from sollold.cluster.gossip.record import State
from sollold.engines.commands import Commit, Release, Reserve
from sollold.engines.install.find import Llama
from sollold.models.model import Model
from tests.agent_cluster import TERM, AgentCluster, plan, running_agents
from tests.doubles import until

pytestmark = pytest.mark.llama


def processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def harm(cluster: AgentCluster, deployment: str, chance: random.Random) -> None:
    """Cause one random fault or unload of a deployment."""
    await asyncio.sleep(chance.choice([0.0, 0.02, 0.1, 0.3]))
    fault = chance.choice(["kill", "stop", "fail", "unload", "release at owner", "lost calls"])
    running = processes()
    match fault:
        case "kill" | "stop" if running:
            victim = chance.choice(running)
            os.kill(victim.pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            await asyncio.sleep(0.1)
            cluster.agents["a"].deployments.fail(deployment, "it makes no token")
        case "unload":
            await cluster.agents["a"].deployments.unload(deployment, "for a test", force=True)
        case "release at owner":
            await cluster.call("l", "b", "release", Release(TERM, deployment, "a"))
        case "lost calls":
            cluster.cut.add(("a", "b"))
            cluster.agents["a"].deployments.fail(deployment, "no way to b")
        case _:
            cluster.agents["a"].deployments.fail(deployment, "for a test")


@pytest.mark.parametrize("seed", range(3))
async def test_no_processes_grants_or_tasks_remain_after_faults(
    folder: Path, llama: Llama, tiny: Model, seed: int
) -> None:
    chance = random.Random(seed)
    async with running_agents(folder, llama, "a", "b", "c") as cluster:
        cluster.models[tiny.digest] = tiny
        for number in range(6):
            name = f"d{number}"
            await cluster.deploy(name, plan(tiny, "a", ("b", 3), ("c", 2), ("a", 2)))
            if chance.random() < 0.6:
                await cluster.until("a", name, State.READY, State.FAILED)
            await harm(cluster, name, chance)
            await until(lambda: not cluster.agents["a"].grants.ledger.grants(), 20.0)
            await until(lambda: not cluster.agents["c"].grants.ledger.grants(), 20.0)
            if ("a", "b") in cluster.cut:
                # b was not notified: it would keep its worker until the grant expires.
                cluster.cut.clear()
                await cluster.call("a", "b", "release", Release(TERM, name, "a"))
            await until(lambda: not cluster.agents["b"].grants.ledger.grants(), 20.0)
            await until(lambda: processes() == [], 20.0, lambda: f"left over: {processes()}")
        for agent in cluster.agents.values():
            assert agent.grants.ledger.available("CPU") == agent.grants.ledger.devices()[0].available
            assert agent._ports._taken == agent.grants._ports._taken == set()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_the_worker_ends_when_its_grant_is_not_renewed(folder: Path, llama: Llama) -> None:
    async with running_agents(folder, llama, "b") as cluster:
        cluster.agents["b"].grants.ledger._grant_seconds = 1.0
        plan_bytes = {"CPU": 1 << 20}
        assert (await cluster.call("l", "b", "reserve", Reserve(TERM, "d", "a", plan_bytes))).ok
        assert (await cluster.call("a", "b", "commit", Commit("d", "a", ("CPU",), llama.build))).ok
        assert len(processes()) == 1
        await until(lambda: processes() == [] and not cluster.agents["b"].grants.ledger.grants(), 10.0)


def test_a_deployment_does_not_block_the_event_loop(folder: Path, llama: Llama, tiny: Model) -> None:
    async def run() -> None:
        with blockbuster_ctx():
            async with running_agents(folder, llama, "a", "b") as cluster:
                cluster.models[tiny.digest] = tiny
                await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
                await cluster.until("a", "d", State.READY)
                assert (await cluster.agents["a"].deployments.unload("d", "for a test")).ok

    uvloop.run(run())
