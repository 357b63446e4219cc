"""Deployments of agents with real llama.cpp processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from sollold.agent.agent import Agent
from sollold.cluster.gossip.record import Backend, State
from sollold.cluster.net.rpc import PeerError
from sollold.engines.address import EngineAddress
from sollold.engines.commands import Commit, Deploy, Done, Reserve, Unload
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp import deployment, llama_server, load_progress, participants
from sollold.engines.llamacpp.engine_key import EngineKey
from sollold.engines.llamacpp.kept_prompts import KeptPrompts
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.process import Process
from sollold.engines.llamacpp.rpc_worker import Worker
from sollold.models.gguf.header import Header
from sollold.models.model import Model
from sollold.settings.schema import MIB, ServingSettings
from tests.agent_cluster import TERM, plan, running_agents
from tests.doubles import until
from tests.gguf.size import Size
from tests.gguf.writer import write
from tests.strangers import stranger

pytestmark = pytest.mark.llama


def engine_of(agent: Agent, name: str) -> EngineAddress:
    """The address of the llama-server of a deployment."""
    engine = agent.deployments.address(name)
    assert engine is not None
    return engine


def worker_process(agent: Agent) -> Process:
    """The process of the worker of deployment d."""
    worker = agent.grants.workers.get("d")
    assert worker is not None
    return worker.process


async def answer(agent: Agent, name: str) -> str:
    """The text of a completion of 24 tokens by a deployment."""
    body = {"prompt": "one two three", "n_predict": 24, "temperature": 0, "cache_prompt": False}
    with agent.deployments.busy(name):
        engine = engine_of(agent, name)
        async with aiohttp.ClientSession(headers=engine.headers) as http:
            async with http.post(engine.url + "/completion", json=body) as reply:
                assert reply.status == 200
                completion = await reply.json()
    assert completion["tokens_predicted"] == 24
    return str(completion["content"])


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def test_a_spread_model_gives_the_same_answer_as_a_local_one(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a", "b", "c") as cluster:
        cluster.models[tiny.digest] = tiny
        assert (await cluster.deploy("whole", plan(tiny, "a"))).ok
        assert (await cluster.deploy("spread", plan(tiny, "a", ("b", 3), ("c", 2), ("a", 2)))).ok
        local = await cluster.until("a", "whole", State.READY)
        sharded = await cluster.until("a", "spread", State.READY)
        assert (local.backend, sharded.backend) == (Backend.LOCAL, Backend.SHARDED)
        assert [(p.node, p.first, p.last) for p in sharded.placed] == [
            ("a", 0, 0),
            ("b", 0, 3),
            ("c", 3, 5),
            ("a", 5, 7),
        ]
        log = await asyncio.to_thread((folder / "a/state/logs/spread/llama-server.log").read_text)
        for layer, device in enumerate(["RPC0"] * 3 + ["RPC1"] * 2 + ["RPC2"] * 2):
            assert f"layer   {layer} assigned to device {device}" in log
        assert await answer(cluster.agents["a"], "whole") == await answer(cluster.agents["a"], "spread")
        for name in ("whole", "spread"):
            done = await cluster.call("l", "a", "unload", Unload(TERM, name))
            assert done == Done(True)
        for agent in cluster.agents.values():
            assert agent.grants.ledger.grants() == ()
        assert children() == []
        await until(lambda: cluster.views["a"].me.endpoints == ())


async def test_a_record_lists_the_models_with_cached_tensors(folder: Path, llama: Llama) -> None:
    # Workers cache tensors larger than 10 MiB.
    file = write(folder / "wide.gguf", "llama", Size(layers=2, embd=1024, ff=16384))
    wide = Model("wide:latest", "e" * 64, "folder", (str(file),), file.stat().st_size, 0.0, layers=2)
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[wide.digest] = wide
        assert (await cluster.deploy("spread", plan(wide, "a", ("b", 2), ("a", 1), size=400 * MIB))).ok
        await cluster.until("a", "spread", State.READY)
        await until(lambda: bool(cluster.views["b"].me.cached), 30)
        ((digest, size),) = cluster.views["b"].me.cached
        assert digest == "e" * 16
        assert size > 20 * MIB
        # The head's own worker reads the local file and needs no cache.
        assert cluster.views["a"].me.cached == ()


async def test_engines_listen_only_on_loopback(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        listening = [
            connection.laddr.ip
            for child in children()
            for connection in child.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1", "127.0.0.1"]


async def test_requests_without_an_engines_key_are_refused(folder: Path, llama: Llama, tiny: Model) -> None:
    keys = folder / "a/state/engine_keys"
    keys.mkdir(parents=True)
    (keys / "18080.key").write_text("left by an earlier run")
    async with running_agents(folder, llama, "a") as cluster:
        assert list(keys.iterdir()) == []
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a"))
        await cluster.until("a", "d", State.READY)
        engine = engine_of(cluster.agents["a"], "d")
        for key, status in (("", 401), ("wrong", 401), (engine.key, 200)):
            async with aiohttp.ClientSession(headers=EngineAddress("", key).headers) as http:
                for path in ("/slots", "/metrics", "/props"):
                    async with http.get(engine.url + path) as reply:
                        assert reply.status == status, path
                body = {"prompt": "a", "n_predict": 1}
                async with http.post(engine.url + "/completion", json=body) as reply:
                    assert reply.status == status
        (file,) = keys.iterdir()
        assert file.read_text() == f"{engine.key}\n"
        files = [path for path in (folder / "a/state").rglob("*") if path.is_file()]
        assert {file, folder / "a/state/children.json", folder / "a/state/logs/d/llama-server.log"} <= {
            *files
        }
        assert [path for path in files if path.stat().st_mode & 0o077] == []
        visible = repr(engine) + (folder / "a/state/logs/d/llama-server.log").read_text()
        visible += "".join(argument for child in children() for argument in child.cmdline())
        visible += "".join(f"{child.environ()}" for child in children())
        assert engine.key not in visible
        assert await cluster.call("l", "a", "unload", Unload(TERM, "d")) == Done(True)
        assert list(keys.iterdir()) == []


@pytest.mark.parametrize("stays", [True, False])
async def test_a_worker_is_restarted_after_a_connection_of_another_user(
    folder: Path, llama: Llama, stays: bool
) -> None:
    async with running_agents(folder, llama, "b") as cluster:
        assert (await cluster.call("l", "b", "reserve", Reserve(TERM, "d", "a", {"CPU": 40 * MIB}))).ok
        commit = Commit("d", "a", ("CPU",), llama.build, "d" * 64)
        assert await cluster.call("a", "b", "commit", commit) == Done(True)
        workers = cluster.servers["b"].workers
        host, port = await workers.address("a", "d", "")
        first = worker_process(cluster.agents["b"])
        with ExitStack() as stack:
            other = await asyncio.to_thread(stack.enter_context, stranger(port))
            await until(lambda: "Accepted client connection" in first.last_lines())
            if not stays:
                await asyncio.to_thread(other.leave)
            host, port = await workers.address("a", "d", "")
            assert not first.running
            with socket.create_connection((host, port)) as mine:
                assert await workers.connected("d")
                second = await asyncio.to_thread(stack.enter_context, stranger(port))
                assert not await workers.connected("d"), "another user is waiting for the worker"
                assert await asyncio.to_thread(second.outcome) == "refused"
                assert mine.recv(1) == b""
        host, port = await workers.address("a", "d", "")
        with socket.create_connection((host, port)):
            assert await workers.connected("d")
        assert cluster.agents["b"].grants.ledger.live("d")


async def test_a_killed_worker_ends_the_deployment_and_releases_all_grants(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a", "b", "c") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4), ("c", 3)))
        await cluster.until("a", "d", State.READY)
        os.kill(worker_process(cluster.agents["b"]).pid, signal.SIGKILL)
        failed = await cluster.until("a", "d", State.FAILED, seconds=2.0)
        assert failed.culprit == "b" and not failed.crashed
        assert failed.reason.startswith("a worker exited: it was killed (SIGKILL)")
        assert failed.reason.endswith("(pc-b)")
        await until(lambda: not any(agent.grants.ledger.grants() for agent in cluster.agents.values()))
        assert children() == []
        assert cluster.agents["a"].deployments.address("d") is None


async def test_a_broken_tunnel_ends_the_deployment(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        cluster.tunnels[0].on_break("the tunnel to node b broke: for a test")
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert failed.reason == "the tunnel to pc-b broke: for a test"
        await until(lambda: not children())


async def test_a_deployment_with_a_hanging_worker_can_be_ended(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        os.kill(worker_process(cluster.agents["b"]).pid, signal.SIGSTOP)
        cluster.agents["a"].deployments.fail("d", "no token for 120 s")
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.reason == "no token for 120 s"
        await until(lambda: children() == [])
        await until(lambda: not any(agent.grants.ledger.grants() for agent in cluster.agents.values()))


async def test_a_deployment_that_fails_to_save_its_prompts_releases_everything(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(KeptPrompts, "save", fail)
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        assert (await cluster.call("l", "a", "unload", Unload(TERM, "d"))).ok
        assert children() == []
        assert not any(agent.grants.ledger.grants() for agent in cluster.agents.values())


async def test_a_load_that_completes_while_it_is_ended_does_not_become_ready(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[State] = []
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = tiny

        async def end(*arguments: object) -> None:
            loading = cluster.agents["a"].deployments.all["d"]
            loading.subscribe(lambda: states.append(loading.state))
            loading.end("evicted", state=State.DRAINING)

        monkeypatch.setattr(KeptPrompts, "restore", end)
        await cluster.deploy("d", plan(tiny, "a"))
        await until(lambda: states != [] and not cluster.agents["a"].deployments.all)
    assert set(states) == {State.DRAINING}


async def test_a_deployment_ends_when_an_owner_leaves(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        cluster.dead.add("b")
        cluster.cut |= {("*", "b"), ("b", "*")}
        cluster.views["a"].tell()
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert failed.reason == "pc-b left the cluster; it held layers of this model"
        await until(lambda: not cluster.tunnels[0].open)
        await until(lambda: cluster.agents["a"].grants.ledger.grants() == ())
        assert cluster.agents["b"].grants.ledger.grants(), "b was not notified; its grant expires later"


async def test_only_the_head_gets_the_address_of_a_worker(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        assert (await cluster.servers["b"].workers.address("a", "d", ""))[1] > 0
        with pytest.raises(PeerError, match="c is not the head"):
            await cluster.servers["b"].workers.address("c", "d", "")
        with pytest.raises(PeerError, match="no worker"):
            await cluster.servers["b"].workers.address("a", "e", "")


async def test_a_failed_load_is_reported_with_its_cause(folder: Path, llama: Llama, tiny: Model) -> None:
    broken = folder / "broken.gguf"
    content = await asyncio.to_thread(Path(tiny.files[0]).read_bytes)
    await asyncio.to_thread(broken.write_bytes, content[:100_000])
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = Model(
            "x:latest", tiny.digest, "folder", (str(broken),), 1, 0.0, layers=6
        )
        await cluster.deploy("d", plan(tiny, "a"))
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.culprit == "a"
        assert "llama-server: it exited with code 1" in failed.reason
        assert "not within the file bounds" in failed.reason, "the cause is included"
        await until(lambda: cluster.agents["a"].grants.ledger.grants() == ())


async def test_a_deployment_is_unloaded_when_idle_but_not_during_a_request(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a"), keep_alive=0.5)
        await cluster.until("a", "d", State.READY)
        with cluster.agents["a"].deployments.busy("d"):
            refused = await cluster.call("l", "a", "unload", Unload(TERM, "d"))
            assert refused == Done(False, "tiny:latest has running requests")
            await asyncio.sleep(2.5)
            assert cluster.agents["a"].deployments.address("d")
        await until(lambda: cluster.agents["a"].deployments.endpoint("d") is None)
        assert cluster.agents["a"].grants.ledger.grants() == ()


async def test_the_request_that_waited_for_the_load_is_served_also_without_keep_alive(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agents(folder, llama, "a") as cluster:
        agent = cluster.agents["a"]
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a"), keep_alive=0.0)
        await cluster.until("a", "d", State.READY)
        agent.deployments.unload_idle()
        with agent.deployments.busy("d"):
            agent.deployments.unload_idle()
            assert agent.deployments.address("d"), "it has a request"
        agent.deployments.unload_idle()
        assert agent.deployments.address("d") is None
        monkeypatch.setattr(deployment, "FIRST_SECONDS", 0.0)
        await cluster.deploy("e", plan(tiny, "a"), keep_alive=0.0)
        await until(lambda: agent.deployments.endpoint("e") is None)


async def test_a_load_is_aborted_only_if_forced(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a"))
        refused = await cluster.call("l", "a", "unload", Unload(TERM, "d"))
        assert refused == Done(False, "tiny:latest is being loaded for a waiting request")
        deployed = cluster.agents["a"].deployments.all["d"]
        assert await cluster.call("l", "a", "unload", Unload(TERM, "d", force=True)) == Done(True)
        assert deployed.endpoint().forced, "waiting requests must not load it again"
        assert cluster.agents["a"].deployments.endpoint("d") is None
        assert cluster.agents["a"].grants.ledger.grants() == ()


async def test_a_deployment_fails_when_an_owner_does_not_commit(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.reserve("d", plan(tiny, "a", ("b", 4)))
        cluster.cut.add(("a", "b"))
        await cluster.call("l", "a", "deploy", Deploy(TERM, "d", plan(tiny, "a", ("b", 4)), -1.0))
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.culprit == "b"
        assert "b can't be reached" in failed.reason
        await until(lambda: cluster.agents["a"].grants.ledger.grants() == ())
        assert cluster.agents["b"].grants.ledger.grants()[0].state == "reserved"


@pytest.mark.parametrize("slow", ["a", "b"])
async def test_a_grant_does_not_expire_while_a_worker_starts(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    monkeypatch.setattr(participants, "RENEW_SECONDS", 0.2)
    start = Worker.start

    async def start_late(*arguments: Any, **more: Any) -> Worker:
        if more["logs"].is_relative_to(folder / slow):
            await asyncio.sleep(3.0)
        return await start(*arguments, **more)

    monkeypatch.setattr(Worker, "start", start_late)
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        for agent in cluster.agents.values():
            monkeypatch.setattr(agent.grants.ledger, "_grant_seconds", 1.0)
        await cluster.deploy("d", plan(tiny, "a", ("a", 2), ("b", 2)))
        await cluster.until("a", "d", State.READY, State.FAILED)
        (endpoint,) = cluster.views["a"].me.endpoints
        assert (endpoint.state, endpoint.reason) == (State.READY, "")


@pytest.mark.parametrize("fraction, waiting", [(0.0, False), (0.0, True), (1.0, False)])
async def test_a_stalled_load_fails(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch, fraction: float, waiting: bool
) -> None:
    monkeypatch.setattr(Process, "waits_for_disk", lambda self: waiting)
    monkeypatch.setattr(load_progress, "stall_seconds", lambda model, progress: 1.5)
    progress_in = llama_server.progress_in
    monkeypatch.setattr(
        llama_server, "progress_in", lambda line: fraction if progress_in(line) is not None else None
    )
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        monkeypatch.setattr(llama_server.Head, "ready", lambda self, http: asyncio.sleep(600))
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.reason.startswith(f"loading stalled at {fraction:.0%}: no progress for")
        assert ("llama-server waits for a file" in failed.reason) == waiting
        assert not failed.hung, "the cause may be on b"
        await until(lambda: children() == [])


async def test_a_llama_server_that_hangs_without_output_fails(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_progress, "FIRST_WORD_SECONDS", 3.0)
    hangs = folder / "llama-server"
    hangs.write_text(f'#!/bin/sh\ncase "$*" in *--port*) exec sleep 600;; esac\nexec {llama.server} "$@"\n')
    hangs.chmod(0o755)
    async with running_agents(folder, replace(llama, server=hangs), "a") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a"))
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.reason.startswith("llama-server hung at startup: no activity for")
        assert failed.hung
        await until(lambda: children() == [])


async def test_a_load_fails_if_the_disk_of_the_state_folder_hangs(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "START_SECONDS", 1.0)
    monkeypatch.setattr(llama_server, "_REMOVE_SECONDS", 0.1)
    responds = threading.Event()

    def hang(key: EngineKey) -> None:
        assert responds.wait(60)

    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        with monkeypatch.context() as disk:
            disk.setattr(EngineKey, "make", hang)
            disk.setattr(EngineKey, "remove", hang)
            try:
                await cluster.deploy("d", plan(tiny, "a", ("b", 2)))
                failed = await cluster.until("a", "d", State.FAILED)
                assert "not started within" in failed.reason and str(folder) in failed.reason
                await until(
                    lambda: not any(agent.grants.ledger.holds("d") for agent in cluster.agents.values())
                )
            finally:
                responds.set()


def test_time_while_the_daemon_was_suspended_is_not_a_stall(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for reported in (False, True):
        progress = load_progress.LoadProgress(tiny)
        if reported:
            progress.advance(0.5)
        assert not progress.stalled(7, False)
        now += 180.0  # the daemon and llama-server were suspended
        assert not progress.stalled(7, False)
        for _ in range(50):
            now += 1.0
            assert not progress.stalled(7, False)
        for _ in range(20):
            now += 1.0
            seconds = progress.stalled(7, False)
        assert 60.0 < seconds < 80.0


def test_cpu_use_and_disk_waits_are_not_a_stall(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    working, disk, unknown = (load_progress.LoadProgress(tiny) for _ in range(3))
    for work in range(170):
        now += 1.0
        assert not working.stalled(work // 30, False)
        assert not disk.stalled(1, True)
        assert not unknown.stalled(None, False)
    for _ in range(20):
        now += 1.0
        seconds = disk.stalled(1, True)
    assert seconds


class TakenPort(Ports):
    """Returns first a port that another program uses."""

    def __init__(self, taken: int) -> None:
        super().__init__(0)
        self._first_ports = [taken]

    def take_port(self) -> int:
        return self._first_ports.pop() if self._first_ports else super().take_port()


async def test_an_engine_is_started_again_if_its_port_is_in_use(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as worker_port,
        socket.create_server(("127.0.0.1", 0)) as server_port,
    ):
        async with running_agents(folder, llama, "a", "b") as cluster:
            cluster.models[tiny.digest] = tiny
            cluster.agents["b"].grants._ports = TakenPort(worker_port.getsockname()[1])
            cluster.agents["a"]._ports = TakenPort(server_port.getsockname()[1])
            await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
            await cluster.until("a", "d", State.READY)
            assert await answer(cluster.agents["a"], "d")


async def test_an_engine_is_started_again_if_another_program_answers_on_its_port(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async def welcome(request: web.BaseRequest) -> web.Response:
        return web.Response(text="welcome")

    other = web.ServerRunner(web.Server(welcome))
    await other.setup()
    await web.TCPSite(other, "127.0.0.1", 0).start()
    try:
        async with running_agents(folder, llama, "a") as cluster:
            cluster.models[tiny.digest] = tiny
            taken = other.addresses[0][1]
            cluster.agents["a"]._ports = TakenPort(taken)
            await cluster.deploy("d", plan(tiny, "a"))
            await cluster.until("a", "d", State.READY)
            assert await answer(cluster.agents["a"], "d")
            assert not engine_of(cluster.agents["a"], "d").url.endswith(f":{taken}")
    finally:
        await other.cleanup()


async def test_a_deployment_ends_when_idle_if_an_owner_drains(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        agent = cluster.agents["a"]
        await cluster.deploy("d", plan(tiny, "a", ("b", 3)))
        await cluster.until("a", "d", State.READY)
        with agent.deployments.busy("d"):
            cluster.drains("b")
            endpoint = agent.deployments.endpoint("d")
            assert endpoint is not None and endpoint.closing and endpoint.state is State.READY
            cluster.drains("b", False)
            endpoint = agent.deployments.endpoint("d")
            assert endpoint is not None and not endpoint.closing
            cluster.drains("b")
            # Running requests continue with the draining worker.
            assert len(await answer(agent, "d")) > 0
            assert cluster.agents["b"].grants.ledger.holds("d")
        await until(lambda: agent.deployments.endpoint("d") is None)
        assert not cluster.agents["b"].grants.ledger.holds("d")


async def test_a_busy_deployment_ends_at_the_drain_limit(folder: Path, llama: Llama, tiny: Model) -> None:
    async with running_agents(folder, llama, "b") as cluster:
        agent = await cluster.add("a", serving=ServingSettings(drain_limit=0.3))
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 3)))
        await cluster.until("a", "d", State.READY)
        with agent.deployments.busy("d"):
            cluster.drains("b")
            await until(lambda: not cluster.agents["b"].grants.ledger.holds("d"))
        await until(lambda: cluster.views["a"].me.endpoints == ())


@pytest.mark.parametrize("program", ["worker", "head"])
async def test_a_segmentation_fault_counts_as_a_crash(
    folder: Path, llama: Llama, tiny: Model, program: str
) -> None:
    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        await cluster.until("a", "d", State.READY)
        worker = worker_process(cluster.agents["b"])
        server = cluster.agents["a"].deployments.all["d"].head
        assert server is not None
        os.kill(worker.pid if program == "worker" else server.process.pid, signal.SIGSEGV)
        failed = await cluster.until("a", "d", State.FAILED)
        assert (failed.culprit, failed.crashed) == ("b" if program == "worker" else "a", True)


async def test_an_unloadable_draft_model_is_left_out(
    folder: Path, llama: Llama, tiny: Model, tmp_path: Path
) -> None:
    bad = tmp_path / "draft.gguf"
    bad.write_bytes(b"GGUF and no more")
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models |= {tiny.digest: tiny, "d2": replace(tiny, digest="d2", files=(str(bad),))}
        base = plan(tiny, "a")
        run = replace(base.run, drafts=3)
        drafting = replace(base, run=run, drafts_by="bad:latest", draft_digest="d2", draft_device="CPU")
        done = await cluster.deploy("d", drafting)
        assert done.ok, done.reason
        ready = await cluster.until("a", "d", State.READY)
        assert "without drafts by bad:latest" in ready.reason and not ready.drafts.by
        assert await answer(cluster.agents["a"], "d")


async def test_an_unloadable_projector_is_left_out(
    folder: Path, llama: Llama, tiny: Model, tmp_path: Path
) -> None:
    bad = tmp_path / "mmproj.gguf"
    bad.write_bytes(b"GGUF and no more")
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = replace(tiny, projector=str(bad))
        await cluster.deploy("d", plan(tiny, "a"))
        ready = await cluster.until("a", "d", State.READY)
        assert "without its projector" in ready.reason
        assert await answer(cluster.agents["a"], "d")


async def test_a_model_on_a_hanging_share_is_not_loaded(
    folder: Path, llama: Llama, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def header(model: Model) -> Header:
        raise LookupError("/mnt/models does not answer")

    async with running_agents(folder, llama, "a", "b") as cluster:
        cluster.models[tiny.digest] = tiny
        monkeypatch.setattr(cluster.agents["a"], "_header", header)
        await cluster.deploy("d", plan(tiny, "a", ("b", 4)))
        failed = await cluster.until("a", "d", State.FAILED)
        assert failed.reason == "/mnt/models does not answer"
        assert failed.culprit == "a"
        await until(lambda: children() == [])
