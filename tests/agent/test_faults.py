"""A seeded row of faults on real processes: whatever dies when, nothing is left over."""

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

from sollold.agent.commands import Commit, Release, Reserve
from sollold.agent.llama_find import Llama
from sollold.cluster.record import State
from sollold.models.model import Model
from tests.agent.town import TERM, Town, eventually, founded, plan

pytestmark = pytest.mark.llama


def processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def harm(town: Town, deployment: str, chance: random.Random) -> None:
    """One fault, or an end that somebody wants."""
    await asyncio.sleep(chance.choice([0.0, 0.02, 0.1, 0.3]))
    what = chance.choice(["kill", "stop", "fail", "unload", "release at owner", "lost calls"])
    running = processes()
    match what:
        case "kill" | "stop" if running:
            one = chance.choice(running)
            os.kill(one.pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            await asyncio.sleep(0.1)
            town.agents["a"].fail(deployment, "it makes no token")
        case "unload":
            await town.agents["a"].unload(deployment, "for a test", force=True)
        case "release at owner":
            await town.call("l", "b", "release", Release(TERM, deployment, "a"))
        case "lost calls":
            town.cut.add(("a", "b"))
            town.agents["a"].fail(deployment, "no way to b")
        case _:
            town.agents["a"].fail(deployment, "for a test")


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_left_over(folder: Path, llama: Llama, tiny: Model, seed: int):
    chance = random.Random(seed)
    async with founded(folder, llama, "a", "b", "c") as town:
        town.models[tiny.digest] = tiny
        for turn in range(6):
            name = f"d{turn}"
            await town.deploy(name, plan(tiny, "a", ("b", 3), ("c", 2), ("a", 2)))
            if chance.random() < 0.6:
                await town.until("a", name, State.READY, State.FAILED)
            await harm(town, name, chance)
            await eventually(lambda: not town.agents["a"].owner.ledger.grants(), 20.0)
            await eventually(lambda: not town.agents["c"].owner.ledger.grants(), 20.0)
            if ("a", "b") in town.cut:
                # b was not told: it holds its worker until the head has been silent for too long.
                town.cut.clear()
                await town.call("a", "b", "release", Release(TERM, name, "a"))
            await eventually(lambda: not town.agents["b"].owner.ledger.grants(), 20.0)
            await eventually(lambda: processes() == [], 20.0, lambda: f"left over: {processes()}")
        for agent in town.agents.values():
            assert agent.owner.ledger.available("CPU") == agent.owner.ledger.devices()[0].available
            assert agent._ports._given == agent.owner._ports._given == set()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_silent_head_loses_its_grant_and_the_worker_ends(folder: Path, llama: Llama):
    async with founded(folder, llama, "b") as town:
        town.agents["b"].owner.ledger._grant_seconds = 1.0
        plan_bytes = {"CPU": 1 << 20}
        assert (await town.call("l", "b", "reserve", Reserve(TERM, "d", "a", plan_bytes))).ok
        assert (await town.call("a", "b", "commit", Commit("d", "a", ("CPU",), llama.build))).ok
        assert len(processes()) == 1
        await eventually(lambda: processes() == [] and not town.agents["b"].owner.ledger.grants(), 10.0)


def test_nothing_blocks_the_daemons_loop(folder: Path, llama: Llama, tiny: Model):
    async def life() -> None:
        with blockbuster_ctx():
            async with founded(folder, llama, "a", "b") as town:
                town.models[tiny.digest] = tiny
                await town.deploy("d", plan(tiny, "a", ("b", 4)))
                await town.until("a", "d", State.READY)
                assert (await town.agents["a"].unload("d", "for a test")).ok

    uvloop.run(life())
