from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from sollold.agent import deployment, head, owners
from sollold.agent.agent import Agent
from sollold.agent.commands import Deploy, Done, Unload
from sollold.agent.llama_find import Llama
from sollold.agent.ports import Ports
from sollold.agent.worker import Worker
from sollold.cluster.peer import PeerError
from sollold.cluster.record import Backend, State
from sollold.config import MIB, ServingSettings
from sollold.models.model import Model
from tests.agent.town import TERM, eventually, founded, plan
from tests.gguf.size import Size
from tests.gguf.writer import write

pytestmark = pytest.mark.llama


async def answer(agent: Agent, name: str) -> str:
    body = {"prompt": "one two three", "n_predict": 24, "temperature": 0, "cache_prompt": False}
    with agent.busy(name):
        async with aiohttp.ClientSession() as http:
            async with http.post(agent.url(name) + "/completion", json=body) as reply:
                assert reply.status == 200
                told = await reply.json()
    assert told["tokens_predicted"] == 24
    return str(told["content"])


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def test_a_spread_model_answers_as_an_undivided_one(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b", "c") as town:
        town.models[tiny.digest] = tiny
        assert (await town.deploy("whole", plan(tiny, "a"))).ok
        assert (await town.deploy("spread", plan(tiny, "a", ("b", 3), ("c", 2), ("a", 2)))).ok
        one = await town.until("a", "whole", State.READY)
        three = await town.until("a", "spread", State.READY)
        assert (one.backend, three.backend) == (Backend.LOCAL, Backend.SHARDED)
        assert [(p.node, p.first, p.last) for p in three.placed] == [
            ("a", 0, 0),
            ("b", 0, 3),
            ("c", 3, 5),
            ("a", 5, 7),
        ]
        log = await asyncio.to_thread((folder / "a/state/logs/spread/llama-server.log").read_text)
        for layer, device in enumerate(["RPC0"] * 3 + ["RPC1"] * 2 + ["RPC2"] * 2):
            assert f"layer   {layer} assigned to device {device}" in log
        assert await answer(town.agents["a"], "whole") == await answer(town.agents["a"], "spread")
        for name in ("whole", "spread"):
            done = await town.call("a", "a", "unload", Unload(TERM, name))
            assert done == Done(True)
        for agent in town.agents.values():
            assert agent.owner.ledger.grants() == ()
        assert children() == []
        await eventually(lambda: town.views["a"].me.endpoints == ())


async def test_a_record_tells_of_the_models_whose_tensors_a_worker_keeps(folder: Path, llama: Llama):
    # Workers keep tensors over 10 MiB.
    file = write(folder / "wide.gguf", "llama", Size(layers=2, embd=1024, ff=16384))
    wide = Model("wide:latest", "e" * 64, "folder", (str(file),), file.stat().st_size, 0.0, layers=2)
    async with founded(folder, llama, "a", "b") as town:
        town.models[wide.digest] = wide
        assert (await town.deploy("spread", plan(wide, "a", ("b", 2), ("a", 1), size=400 * MIB))).ok
        await town.until("a", "spread", State.READY)
        await eventually(lambda: bool(town.views["b"].me.cached), 30)
        ((digest, size),) = town.views["b"].me.cached
        assert digest == "e" * 16
        assert size > 20 * MIB
        # The head's own worker reads the file, which is here.
        assert town.views["a"].me.cached == ()


async def test_everything_listens_on_loopback_alone(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        listening = [
            connection.laddr.ip
            for child in children()
            for connection in child.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1", "127.0.0.1"]


async def test_a_workers_death_ends_the_deployment_and_frees_every_byte(
    folder: Path, llama: Llama, tiny: Model
):
    async with founded(folder, llama, "a", "b", "c") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4), ("c", 3)))
        await town.until("a", "d", State.READY)
        os.kill(town.agents["b"].owner._workers["d"].process.pid, signal.SIGKILL)
        failed = await town.until("a", "d", State.FAILED, seconds=2.0)
        assert failed.culprit == "b" and not failed.crashed
        assert "a worker is gone: it was killed (SIGKILL)" in failed.reason
        await eventually(lambda: not any(agent.owner.ledger.grants() for agent in town.agents.values()))
        assert children() == []
        with pytest.raises(LookupError):
            town.agents["a"].url("d")


async def test_a_tunnel_that_breaks_ends_the_deployment_though_all_its_processes_live(
    folder: Path, llama: Llama, tiny: Model
):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        town.tunnels[0].on_break("the tunnel to node b broke: for a test")
        failed = await town.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert failed.reason == "the tunnel to node b broke: for a test"
        await eventually(lambda: not children())


async def test_a_hanging_worker_does_not_keep_the_deployment(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        os.kill(town.agents["b"].owner._workers["d"].process.pid, signal.SIGSTOP)
        town.agents["a"].fail("d", "no token for 120 s")
        failed = await town.until("a", "d", State.FAILED)
        assert failed.reason == "no token for 120 s"
        await eventually(lambda: children() == [])
        await eventually(lambda: not any(agent.owner.ledger.grants() for agent in town.agents.values()))


async def test_it_ends_when_an_owner_is_gone(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        town.dead.add("b")
        town.cut |= {("*", "b"), ("b", "*")}
        town.views["a"].changed()
        failed = await town.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert failed.reason == "node b is gone, which held layers of it"
        await eventually(lambda: not town.tunnels[0].open)
        await eventually(lambda: town.agents["a"].owner.ledger.grants() == ())
        assert town.agents["b"].owner.ledger.grants(), "b has heard nothing yet: its time to live frees it"


async def test_a_tunnel_leads_its_head_alone_to_the_worker(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        assert town.servers["b"].resolve("a", "d", "")[1] > 0
        with pytest.raises(PeerError, match="c is not the head"):
            town.servers["b"].resolve("c", "d", "")
        with pytest.raises(PeerError, match="no worker"):
            town.servers["b"].resolve("a", "e", "")


async def test_a_load_that_fails_says_why(folder: Path, llama: Llama, tiny: Model):
    broken = folder / "broken.gguf"
    whole = await asyncio.to_thread(Path(tiny.files[0]).read_bytes)
    await asyncio.to_thread(broken.write_bytes, whole[:100_000])
    async with founded(folder, llama, "a") as town:
        town.models[tiny.digest] = Model("x:latest", tiny.digest, "folder", (str(broken),), 1, 0.0, layers=6)
        await town.deploy("d", plan(tiny, "a"))
        failed = await town.until("a", "d", State.FAILED)
        assert failed.culprit == "a"
        assert "llama-server: it ended with exit code 1" in failed.reason
        assert "fail" in failed.reason
        assert town.agents["a"].owner.ledger.grants() == ()


async def test_it_is_unloaded_when_idle_but_not_while_a_request_is_in_it(
    folder: Path, llama: Llama, tiny: Model
):
    async with founded(folder, llama, "a") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a"), keep_alive=0.5)
        await town.until("a", "d", State.READY)
        with town.agents["a"].busy("d"):
            refused = await town.call("a", "a", "unload", Unload(TERM, "d"))
            assert refused == Done(False, "tiny:latest has requests in it")
            await asyncio.sleep(2.5)
            assert town.agents["a"].url("d")
        await eventually(lambda: town.agents["a"].deployment("d") is None)
        assert town.agents["a"].owner.ledger.grants() == ()


async def test_who_waited_for_the_load_may_come_however_short_it_is_kept(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
):
    async with founded(folder, llama, "a") as town:
        agent = town.agents["a"]
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a"), keep_alive=0.0)
        await town.until("a", "d", State.READY)
        agent._unload_idle()
        with agent.busy("d"):
            agent._unload_idle()
        agent._unload_idle()
        with pytest.raises(LookupError):
            agent.url("d")
        monkeypatch.setattr(deployment, "FIRST_SECONDS", 0.0)
        await town.deploy("e", plan(tiny, "a"), keep_alive=0.0)
        await eventually(lambda: agent.deployment("e") is None)


async def test_a_load_is_ended_only_by_force(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a"))
        refused = await town.call("a", "a", "unload", Unload(TERM, "d"))
        assert refused == Done(False, "tiny:latest is being loaded, for somebody who waits for it")
        assert await town.call("a", "a", "unload", Unload(TERM, "d", force=True)) == Done(True)
        assert town.agents["a"].deployment("d") is None
        assert town.agents["a"].owner.ledger.grants() == ()


async def test_an_owner_that_does_not_commit_ends_it(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.reserve("d", plan(tiny, "a", ("b", 4)))
        town.cut.add(("a", "b"))
        await town.call("a", "a", "deploy", Deploy(TERM, "d", plan(tiny, "a", ("b", 4)), -1.0))
        failed = await town.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert "b can't be reached" in failed.reason
        await eventually(lambda: town.agents["a"].owner.ledger.grants() == ())
        assert town.agents["b"].owner.ledger.grants()[0].state == "reserved"


@pytest.mark.parametrize("slow", ["a", "b"])
async def test_a_grant_does_not_run_out_while_a_worker_starts(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch, slow: str
):
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.2)
    start = Worker.start

    async def start_late(*arguments: Any, **more: Any) -> Worker:
        if more["logs"].is_relative_to(folder / slow):
            await asyncio.sleep(3.0)
        return await start(*arguments, **more)

    monkeypatch.setattr(Worker, "start", start_late)
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        for agent in town.agents.values():
            monkeypatch.setattr(agent.owner.ledger, "_grant_seconds", 1.0)
        await town.deploy("d", plan(tiny, "a", ("a", 2), ("b", 2)))
        await town.until("a", "d", State.READY, State.FAILED)
        (endpoint,) = town.views["a"].me.endpoints
        assert (endpoint.state, endpoint.reason) == (State.READY, "")


@pytest.mark.parametrize("at", [0.0, 1.0])
async def test_a_load_that_stands_still_is_given_up(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch, at: float
):
    monkeypatch.setattr(deployment, "_load_patience", lambda model, progress: 1.5)
    known = head.progress_in
    monkeypatch.setattr(head, "progress_in", lambda line: at if known(line) is not None else None)
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        monkeypatch.setattr(deployment.Head, "ready", lambda self, http: asyncio.sleep(600))
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        failed = await town.until("a", "d", State.FAILED)
        assert failed.reason.startswith(f"the load stands still at {at:.0%}: no progress for")
        await eventually(lambda: children() == [])


class Contested(Ports):
    """Gives first a port that another program has taken in the meantime."""

    def __init__(self, taken: int) -> None:
        super().__init__(0)
        self._contested = [taken]

    def take(self) -> int:
        return self._contested.pop() if self._contested else super().take()


async def test_a_port_that_another_program_takes_first_costs_another_try(
    folder: Path, llama: Llama, tiny: Model
):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        async with founded(folder, llama, "a", "b") as town:
            town.models[tiny.digest] = tiny
            town.agents["b"].owner._ports = Contested(one.getsockname()[1])
            town.agents["a"]._ports = Contested(two.getsockname()[1])
            await town.deploy("d", plan(tiny, "a", ("b", 4)))
            await town.until("a", "d", State.READY)
            assert await answer(town.agents["a"], "d")


async def test_a_port_that_another_program_answers_costs_another_try(folder: Path, llama: Llama, tiny: Model):
    async def welcome(request: web.BaseRequest) -> web.Response:
        return web.Response(text="welcome")

    other = web.ServerRunner(web.Server(welcome))
    await other.setup()
    await web.TCPSite(other, "127.0.0.1", 0).start()
    try:
        async with founded(folder, llama, "a") as town:
            town.models[tiny.digest] = tiny
            taken = other.addresses[0][1]
            town.agents["a"]._ports = Contested(taken)
            await town.deploy("d", plan(tiny, "a"))
            await town.until("a", "d", State.READY)
            assert await answer(town.agents["a"], "d")
            assert not town.agents["a"].url("d").endswith(f":{taken}")
    finally:
        await other.cleanup()


async def test_a_deployment_ends_when_idle_once_a_node_that_holds_layers_drains(
    folder: Path, llama: Llama, tiny: Model
):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        agent = town.agents["a"]
        await town.deploy("d", plan(tiny, "a", ("b", 3)))
        await town.until("a", "d", State.READY)
        with agent.busy("d"):
            town.drains("b")
            endpoint = agent.deployment("d")
            assert endpoint is not None and endpoint.closing and endpoint.state is State.READY
            town.drains("b", False)
            endpoint = agent.deployment("d")
            assert endpoint is not None and not endpoint.closing
            town.drains("b")
            # What is in it goes on, with the worker that drains.
            assert len(await answer(agent, "d")) > 0
            assert town.agents["b"].owner.ledger.holds("d")
        await eventually(lambda: agent.deployment("d") is None)
        assert not town.agents["b"].owner.ledger.holds("d")


async def test_a_deployment_in_use_ends_at_the_limit_of_draining(folder: Path, llama: Llama, tiny: Model):
    async with founded(folder, llama, "b") as town:
        agent = await town.add("a", serving=ServingSettings(drain_limit=0.3))
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 3)))
        await town.until("a", "d", State.READY)
        with agent.busy("d"):
            town.drains("b")
            await eventually(lambda: not town.agents["b"].owner.ledger.holds("d"))
        await eventually(lambda: town.views["a"].me.endpoints == ())


@pytest.mark.parametrize("program", ["worker", "head"])
async def test_a_process_that_ends_by_its_own_fault_has_crashed(
    folder: Path, llama: Llama, tiny: Model, program: str
):
    async with founded(folder, llama, "a", "b") as town:
        town.models[tiny.digest] = tiny
        await town.deploy("d", plan(tiny, "a", ("b", 4)))
        await town.until("a", "d", State.READY)
        worker = town.agents["b"].owner._workers["d"].process
        server = town.agents["a"]._deployments["d"].head
        assert server is not None
        os.kill(worker.pid if program == "worker" else server.process.pid, signal.SIGSEGV)
        failed = await town.until("a", "d", State.FAILED)
        assert (failed.culprit, failed.crashed) == ("b" if program == "worker" else "a", True)
