"""The agent's record, its commands, and the route that streams a deployment's progress."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from sollold.agent import grants, memory_monitor
from sollold.agent.record_publisher import SMALL_SECONDS, _ignore_small_changes
from sollold.cluster.gossip.record import Endpoint, State
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Commit, Deploy, Done, Reserve, Unload
from sollold.engines.install.find import Llama, look_at
from sollold.engines.llamacpp.process_log import KEEP_DEPLOYMENTS
from sollold.machine.device import Device, Kind
from sollold.models.model import Model
from sollold.settings.schema import GIB, MIB
from tests.agent_cluster import MISSING_LLAMA, TERM, AgentCluster, plan, running_agents
from tests.doubles import until
from tests.engines.test_llama_setup import SERVER, Workshop

MODEL = Model("m:latest", "d" * 64, "folder", ("/m.gguf",), 1, 0.0, layers=6)


def test_small_changes_of_free_memory_are_ignored() -> None:
    old = Device("CPU", Kind.CPU, "x", 16 * GIB, 8 * GIB, 16 * GIB, 0, 8 * GIB)
    moved = replace(old, free=old.free - 5 * MIB, available=old.available - 5 * MIB)
    assert _ignore_small_changes((old,), (moved,), 200) == (old,)
    assert _ignore_small_changes((old,), (replace(moved, barred=5 * MIB),), 200) == (old,)
    for changed in (
        replace(old, free=old.free - GIB),
        replace(old, available=old.available - GIB),
        replace(moved, granted=1),
        replace(moved, id="CUDA0"),
    ):
        assert _ignore_small_changes((old,), (changed,), 200) == (changed,)
    assert _ignore_small_changes((old,), (), 200) == ()


async def test_small_memory_changes_are_published_later_or_after_a_refusal(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        agent, view = cluster.agents["a"], cluster.views["a"]
        publisher, ledger = agent._publisher, agent.grants.ledger
        (published,) = view.me.devices
        current = [published]
        ledger.devices = lambda: tuple(current)  # type: ignore[method-assign]
        current[0] = replace(published, free=published.free - max(36 * MIB, published.total // 100))
        publisher.publish()
        assert view.me.devices == (published,)
        publisher._exact_at -= SMALL_SECONDS
        publisher.publish()
        assert view.me.devices == tuple(current)
        current[0] = replace(published, free=current[0].free - max(36 * MIB, published.total // 100))
        publisher.publish()
        assert view.me.devices != tuple(current)
        assert not (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": 1 << 60}))).ok
        assert view.me.devices == tuple(current)


async def test_the_record_has_devices_grants_and_build(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        me = cluster.views["a"].me
        assert (me.build, me.setup) == ("b1", "ready")
        assert [device.id for device in me.devices] == ["CPU"]
        assert me.devices[0].available == 2000 * MIB
        assert (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))).ok
        await until(lambda: cluster.views["a"].me.grants != ())
        assert cluster.views["a"].me.devices[0].available == 1999 * MIB


async def test_memory_mapped_by_ollama_is_not_granted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollold.machine.memory._mapped", lambda root: 1 << 50)
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        agent = cluster.agents["a"]
        room = cluster.views["a"].me.devices[0].free - 512 * MIB
        held = {"CPU": room - 100 * MIB}

        async def fake_unload(endpoint: str, force: bool) -> Done:
            return Done(True)

        agent.account_for_ollama(fake_unload, lambda: held)
        request = Reserve(TERM, "d", "b", {"CPU": 1500 * MIB})
        refused = await cluster.call("l", "a", "reserve", request)
        assert not refused.ok and "free" in refused.reason
        held.clear()
        assert (await cluster.call("l", "a", "reserve", request)).ok, "Ollama has unloaded its model"


async def test_the_newest_term_outlives_a_restart(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        await cluster.call("l", "a", "reserve", Reserve(Term(9, "l"), "d", "b", {"CPU": MIB}))
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        refused = await cluster.call("k", "a", "reserve", Reserve(Term(8, "k"), "e", "b", {"CPU": MIB}))
        assert not refused.ok
        assert "older than term 9 of l" in refused.reason
        refused = await cluster.call("k", "a", "unload", Unload(Term(8, "k"), "e"))
        assert not refused.ok


async def deploy(cluster: AgentCluster, term: Term = TERM, head: str = "a") -> Done:
    done = await cluster.call("l", "a", "deploy", Deploy(term, "d", plan(MODEL, head), -1.0))
    assert isinstance(done, Done)
    return done


async def test_an_impossible_deployment_is_refused_with_the_reason(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        assert "nothing is reserved for deployment d" in (await deploy(cluster)).reason
        await cluster.reserve("d", plan(MODEL, "a"))
        assert "the plan's head is b" in (await deploy(cluster, head="b")).reason
        assert "m:latest is no longer on this node" in (await deploy(cluster)).reason
        assert "older" in (await deploy(cluster, Term(0, "z"))).reason


async def test_a_replaced_llama_is_inspected_before_it_is_used(folder: Path) -> None:
    """As when somebody builds another version in its place while the daemon runs."""
    workshop = Workshop(folder)
    server, worker = folder / "made/llama-server", folder / "made/ggml-rpc-server"
    async with running_agents(folder, look_at(server, worker), "a") as cluster:
        await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        workshop.program(server, SERVER.replace("11434", "11999"))
        refused = await cluster.call("b", "a", "commit", Commit("d", "b", ("CPU",), "b11434"))
        assert "this node has llama.cpp b11999, the head b11434" in refused.reason
        assert cluster.views["a"].me.build == "b11999"
        server.unlink()
        assert "llama.cpp was replaced" in (await deploy(cluster)).reason


async def test_only_logs_of_old_ended_deployments_are_deleted(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        logs = folder / "a/state/logs"
        for number in range(KEEP_DEPLOYMENTS + 10):
            (logs / f"old{number}").mkdir(parents=True)
            (logs / f"old{number}/worker.log").write_text("x")
            os.utime(logs / f"old{number}", (number, number))
        await cluster.call("l", "a", "reserve", Reserve(TERM, "old0", "b", {"CPU": MIB}))
        await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        failed = await cluster.call("b", "a", "commit", Commit("d", "b", ("CPU",), "b1"))
        assert not failed.ok
        await until(lambda: len(list(logs.iterdir())) == KEEP_DEPLOYMENTS + 2)
        names = {path.name for path in logs.iterdir()}
        assert {"old0", "d"} <= names and "old9" not in names and "old10" in names


async def test_grants_expire_even_if_memory_cannot_be_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (grants, memory_monitor):
        monkeypatch.setattr(module, "MEASURE_SECONDS", 0.2)
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        agent = cluster.agents["a"]
        agent.grants.ledger._reservation_seconds = 1.0
        assert (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))).ok
        failed: list[int] = []

        def measure() -> None:
            failed.append(1)
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as broken:
            broken.setattr(agent._meter, "measure", measure)
            await until(lambda: len(failed) > 2)
            await until(lambda: agent.grants.ledger.grants() == () and cluster.views["a"].me.grants == ())
        before = agent.grants.memory._measured_at
        await until(lambda: agent.grants.memory._measured_at > before)


async def test_the_record_is_correct_after_a_failed_publication(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        view, real = cluster.views["a"], cluster.views["a"].update_me
        failed: list[int] = []

        def update(**changes: object) -> None:
            failed.append(1)
            view.update_me = real  # type: ignore[method-assign]
            raise OSError(errno.EMFILE, "Too many open files")

        view.update_me = update  # type: ignore[method-assign]
        await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        await until(lambda: bool(failed))
        await cluster.call("l", "a", "reserve", Reserve(TERM, "e", "b", {"CPU": MIB}))
        await until(lambda: {grant.deployment for grant in view.me.grants} == {"d", "e"})


async def test_commits_of_other_builds_or_heads_are_refused(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        done = await cluster.call("b", "a", "commit", Commit("d", "b", ("CPU",), "b2"))
        assert done == Done(False, "this node has llama.cpp b1, the head b2: builds must match")
        done = await cluster.call("thief", "a", "commit", Commit("d", "b", ("CPU",), "b1"))
        assert not done.ok


async def test_a_worker_that_fails_to_start_releases_its_memory(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        done = await cluster.call("b", "a", "commit", Commit("d", "b", ("CPU",), "b1"))
        assert not done.ok
        assert "the worker exited at startup" in done.reason
        await until(lambda: not cluster.agents["a"].grants.ledger.holds("d"))


async def test_a_draining_node_grants_nothing(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        cluster.views["a"].update_me(draining=True)
        refused = await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))
        assert "draining" in refused.reason
        cluster.views["a"].update_me(draining=False)
        assert (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))).ok


@pytest.mark.llama
async def test_the_wait_route_streams_states_until_ready_or_failed(
    folder: Path, llama: Llama, tiny: Model
) -> None:
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[tiny.digest] = tiny
        app = web.Application()
        app.router.add_get("/deployments/{id}/wait", cluster.servers["a"].routes["/deployments/{id}/wait"])
        async with TestClient(TestServer(app)) as client:
            assert (await client.get("/deployments/none/wait")).status == 404
            await cluster.deploy("d", plan(tiny, "a"))
            async with client.get("/deployments/d/wait") as reply:
                endpoints = [msgspec.json.decode(line, type=Endpoint) async for line in reply.content]
            states = [endpoint.state for endpoint in endpoints]
            assert states[0] in (State.STARTING, State.LOADING)
            assert states[-1] is State.READY
            progress = [endpoint.progress for endpoint in endpoints]
            assert progress == sorted(progress)
            cluster.agents["a"].deployments.fail("d", "for a test")
            async with client.get("/deployments/d/wait") as reply:
                endpoints = [msgspec.json.decode(line, type=Endpoint) async for line in reply.content]
            assert [(endpoint.state, endpoint.reason) for endpoint in endpoints] == [
                (State.FAILED, "for a test")
            ]
