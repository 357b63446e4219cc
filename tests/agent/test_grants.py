"""The owner's grants: the term is saved before a response; hanging disks and measurements."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold.agent import grants, memory_monitor, term_file
from sollold.agent.term_file import TermFile
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Commit, Done, Release, Renew, Reserve, Reserved, Unload
from sollold.engines.install.find import Llama
from sollold.machine.devices import DeviceMeter, Measurement
from sollold.settings.schema import MIB
from sollold.settings.state_file import write_whole
from sollold.tasks import cancel_and_wait
from tests.agent_cluster import MISSING_LLAMA, TERM, AgentCluster, running_agents
from tests.doubles import until


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes block until the event is set."""
    ready = threading.Event()
    write = write_whole

    def wait(path: Path, data: bytes) -> None:
        assert ready.wait(30)
        write(path, data)

    monkeypatch.setattr(term_file, "write_whole", wait)
    yield ready
    ready.set()


def reserve(cluster: AgentCluster, term: Term, deployment: str) -> asyncio.Task[Reserved]:
    request = Reserve(term, deployment, "b", {"CPU": MIB})
    return asyncio.create_task(cluster.call(term.leader, "a", "reserve", request))


async def test_concurrent_writes_keep_the_newest_term(folder: Path) -> None:
    file = TermFile(folder)
    for turn in range(1, 25):
        terms = [Term(turn, "k"), Term(turn, "l"), Term(turn, "m")]
        assert await asyncio.gather(*map(file.keep, terms)) == ["", "", ""]
        assert TermFile(folder).read() == terms[-1]
    assert await asyncio.to_thread(lambda: [path.name for path in folder.iterdir()]) == ["term.json"]


async def test_a_command_is_answered_only_after_its_term_is_saved(
    folder: Path, slow_disk: threading.Event
) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        first = reserve(cluster, Term(9, "l"), "d")
        await until(lambda: cluster.agents["a"].grants.ledger.term == Term(9, "l"))
        second = reserve(cluster, Term(9, "l"), "e")
        await until(lambda: cluster.agents["a"].grants.ledger.holds("e"))
        done, _ = await asyncio.wait([first, second], timeout=0.2)
        assert not done
        slow_disk.set()
        assert [(await first).ok, (await second).ok] == [True, True]
        assert TermFile(folder / "a" / "state").read() == Term(9, "l")


async def test_a_suspension_of_the_daemon_expires_no_grant(folder: Path) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        assert (await reserve(cluster, Term(9, "l"), "d")).ok
        owner = cluster.agents["a"].grants
        # The process was suspended for ten minutes.
        owner._clock_read -= 600.0
        owner.ledger.postpone(-600.0)
        owner._apply(owner.ledger.expire(owner._now()))
        assert owner.ledger.holds("d")
        # The process ran, but nobody committed.
        owner.ledger.postpone(-600.0)
        owner._apply(owner.ledger.expire(owner._now()))
        assert not owner.ledger.holds("d")


async def test_a_cancelled_write_does_not_cancel_those_of_others(
    folder: Path, slow_disk: threading.Event
) -> None:
    file = TermFile(folder)
    first = asyncio.create_task(file.keep(Term(3, "l")))
    second = asyncio.create_task(file.keep(Term(4, "l")))
    await asyncio.sleep(0)
    first.cancel()
    slow_disk.set()
    assert await second == ""
    assert TermFile(folder).read() == Term(4, "l")


async def test_a_failed_write_of_the_term_is_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        with monkeypatch.context() as patch:
            patch.setattr(term_file, "write_whole", full)
            for deployment in ("d", "e"):
                refused = await reserve(cluster, Term(9, "l"), deployment)
                assert not refused.ok
                assert "term.json: No space left" in refused.reason
            assert not cluster.agents["a"].grants.ledger.grants()
            assert caplog.text.count("takes part in no load") == 1
        assert (await reserve(cluster, Term(9, "l"), "f")).ok
        assert TermFile(folder / "a" / "state").read() == Term(9, "l")


async def test_a_hanging_measurement_does_not_delay_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_monitor, "MEASURE_SECONDS", 0.2)
    monkeypatch.setattr(memory_monitor, "_MEASURE_TIMEOUT", 0.3)
    release = threading.Event()
    measure = DeviceMeter.measure

    def hang(meter: DeviceMeter) -> object:
        assert release.wait(30)
        return measure(meter)

    monkeypatch.setattr(DeviceMeter, "measure", hang)
    try:
        async with asyncio.timeout(20), running_agents(folder, MISSING_LLAMA, "a") as cluster:
            assert cluster.views["a"].me.build == "b1"
            assert not (await reserve(cluster, Term(9, "l"), "d")).ok
            release.set()
            await until(lambda: cluster.views["a"].me.devices != ())
            assert (await reserve(cluster, Term(9, "l"), "d")).ok
    finally:
        release.set()


async def test_a_hanging_measurement_stops_grants_but_not_expiry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grants, "MEASURE_SECONDS", 0.2)
    monkeypatch.setattr(memory_monitor, "MEASURE_SECONDS", 0.2)
    hanging, release = threading.Event(), threading.Event()
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        owner = cluster.agents["a"].grants
        measure = owner.memory._meter.measure

        def hang() -> object:
            hanging.set()
            assert release.wait(30)
            return measure()

        monkeypatch.setattr(owner.ledger, "_reservation_seconds", 1.0)
        try:
            assert (await reserve(cluster, Term(9, "l"), "d")).ok
            monkeypatch.setattr(memory_monitor, "_MEASURE_TIMEOUT", 0.3)
            monkeypatch.setattr(owner.memory._meter, "measure", hang)
            await until(hanging.is_set)
            await until(lambda: not owner.ledger.grants(), 5.0)
            refused = await asyncio.wait_for(reserve(cluster, Term(9, "l"), "e"), 5.0)
            assert not refused.ok
            assert "can't be measured" in refused.reason
        finally:
            release.set()
        await until(lambda: owner.memory._measuring is None or owner.memory._measuring.done())
        assert (await reserve(cluster, Term(9, "l"), "f")).ok


async def test_a_renewal_is_answered_while_the_disk_of_the_tensor_cache_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        owner = cluster.agents["a"].grants
        asked: list[str] = []

        async def hang(deployment: str) -> bool:
            asked.append(deployment)
            await asyncio.Event().wait()
            return True

        monkeypatch.setattr(owner.workers, "loaded", hang)
        assert (await reserve(cluster, Term(9, "l"), "d")).ok
        assert (await cluster.call("b", "a", "commit", Commit("d", "b", (), MISSING_LLAMA.build))).ok
        for _ in range(3):
            renewal = Renew("d", "b", loaded=True)
            assert (await asyncio.wait_for(cluster.call("b", "a", "renew", renewal), 5.0)).ok
        await until(lambda: asked)
        assert asked == ["d"]


async def test_memory_is_free_while_the_disk_of_the_tensor_cache_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        owner = cluster.agents["a"].grants
        responds = threading.Event()
        deleted: list[str] = []

        def hang(deployment: str) -> None:
            assert responds.wait(30)
            deleted.append(deployment)

        monkeypatch.setattr(owner.workers._cache, "remove_folder", hang)
        try:
            assert (await reserve(cluster, Term(9, "l"), "d")).ok
            assert (await cluster.call("b", "a", "commit", Commit("d", "b", (), MISSING_LLAMA.build))).ok
            release = Release(Term(9, "l"), "d", "b")
            assert (await asyncio.wait_for(cluster.call("b", "a", "release", release), 5.0)).ok
            assert not owner.ledger.holds("d")
        finally:
            responds.set()
        await until(lambda: deleted == ["d"])


async def test_the_folder_of_a_cancelled_start_is_deleted_once_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        workers = cluster.agents["a"].grants.workers
        make, responds = workers._cache.make_folder, threading.Event()

        def slow(deployment: str, size: int) -> Path | None:
            assert responds.wait(30)
            return make(deployment, size)

        monkeypatch.setattr(workers._cache, "make_folder", slow)
        commit = Commit("d", "b", ("CPU",), MISSING_LLAMA.build)
        start = asyncio.create_task(workers.start(commit, MISSING_LLAMA, 0))
        try:
            await until(lambda: bool(workers._making))
            await cancel_and_wait(start)
            await workers.stop("d")
            deleting = asyncio.create_task(workers.delete_files("d"))
            await asyncio.sleep(0.1)
        finally:
            responds.set()
        await deleting
        assert not await asyncio.to_thread(list, (folder / "a").rglob("d"))


async def test_memory_of_a_gpu_that_reports_no_processes_is_counted_once(folder: Path) -> None:
    """As of an AMD GPU, or of any in a container."""
    server = folder / "llama-server"

    def show(free: int) -> None:
        server.write_text(f"#!/bin/sh\necho '  ROCm0: AMD (24000 MiB, {free} MiB free)'\n")
        server.chmod(0o755)

    show(23000)
    cluster = AgentCluster(folder, Llama(server, server, "b1", frozenset()))
    await cluster.add("a", limit=0)
    try:

        async def reserved(deployment: str, size: int) -> str:
            request = Reserve(TERM, deployment, "a", {"ROCm0": size * MIB})
            return str((await cluster.call("l", "a", "reserve", request)).reason)

        assert await reserved("d", 10000) == ""
        assert (await cluster.call("a", "a", "commit", Commit("d", "a", (), "b1"))).ok
        assert "requested" in await reserved("e", 14000), "nothing is loaded yet"
        show(13500)
        assert (await cluster.call("a", "a", "renew", Renew("d", "a", loaded=True))).ok
        assert await reserved("e", 13000) == ""
        assert "requested" in await reserved("f", 500)
        for deployment in "de":
            await cluster.call("l", "a", "release", Release(TERM, deployment, "a"))
        show(23000)
        assert await reserved("f", 22000) == ""
    finally:
        await cluster.close()


async def test_a_grant_counts_memory_that_was_freed_a_moment_ago(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_monitor, "_FRESH_SECONDS", 60.0)
    async with running_agents(folder, MISSING_LLAMA, "a") as cluster:
        agent = cluster.agents["a"]
        measure, measured, responds = agent._meter.measure, 0, threading.Event()

        def counted() -> Measurement:
            nonlocal measured
            measured += 1
            assert responds.wait(30)
            return measure()

        async def unload(endpoint: str, force: bool) -> Done:
            return Done(True)

        monkeypatch.setattr(agent._meter, "measure", counted)
        agent.account_for_ollama(unload, dict)
        try:
            responds.set()
            assert (await cluster.call("l", "a", "unload", Unload(Term(9, "l"), "ollama:m"))).ok
            assert (await reserve(cluster, Term(9, "l"), "d")).ok
            assert measured >= 1
            # A measurement that is running may have missed it.
            responds.clear()
            agent.grants.memory.invalidate()
            reserving, before = reserve(cluster, Term(9, "l"), "e"), measured
            await until(lambda: measured > before)
            agent.grants.memory.invalidate()
            responds.set()
            assert (await reserving).ok
            assert measured >= before + 2
        finally:
            responds.set()
