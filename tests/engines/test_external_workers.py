"""External workers: their handshake, listing and use by one deployment at a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sollold.agent import external_watch
from sollold.agent.agent import Agent
from sollold.cluster.gossip.record import Backend, State
from sollold.cluster.net.rpc import PeerError
from sollold.engines.commands import Reserve
from sollold.engines.external import workers as workers_module
from sollold.engines.external.probe import look
from sollold.engines.external.rpc_protocol import Version
from sollold.engines.external.scan import hosts_beside, scan
from sollold.engines.external.workers import MOST_NAMED, ExternalWorkers
from sollold.engines.install.find import Llama
from sollold.machine.device import Kind
from sollold.machine.external_worker import ExternalState, ExternalWorker
from sollold.models.model import Model
from sollold.placement.plan import Plan, Share
from sollold.settings.schema import MIB, LlamaSettings
from tests.agent_cluster import TERM, AgentCluster, plan
from tests.doubles import until
from tests.engines.test_deployments import answer
from tests.external_worker import occupied, started

OURS = Version(7, 0, 0)


@contextlib.asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
) -> AsyncIterator[int]:
    """Serve connections with ``handle`` on a port of 127.0.0.1."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def test_a_worker_that_does_not_listen_is_dead() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = await look("127.0.0.1", free.getsockname()[1], OURS)
    assert found.state is ExternalState.DEAD and "nothing listens" in found.reason
    nowhere = await look("no-such-host.invalid", 50052, OURS)
    assert nowhere.state is ExternalState.DEAD


async def test_another_program_is_refused() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def shut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    for program, words in ((web, "not a llama.cpp RPC worker"), (shut, "closed the connection")):
        async with listening(program) as port:
            found = await look("127.0.0.1", port, OURS)
            assert found.state is ExternalState.REFUSED and words in found.reason


def workers(address: str, *, allowed: bool = True, held: frozenset[str] = frozenset()) -> ExternalWorkers:
    external = ExternalWorkers([address], allowed, {address: 100 * MIB}, lambda: held, lambda: None)
    external.use_version(OURS)
    return external


@contextlib.asynccontextmanager
async def watched(external: ExternalWorkers) -> AsyncIterator[ExternalWorkers]:
    task = asyncio.create_task(external.run())
    try:
        yield external
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_invalid_address_is_listed_with_the_reason() -> None:
    async with watched(workers("somewhere")) as external:
        (worker,) = external.listed()
        assert worker.state is ExternalState.REFUSED and "'somewhere' is not HOST:PORT" in worker.reason
        assert external.devices() == ()


@pytest.mark.llama
async def test_a_free_worker_is_listed_with_its_memory(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as address, watched(workers(address)) as external:
        await until(lambda: external.listed()[0].state is ExternalState.USABLE)
        (device,) = external.devices()
        assert (device.id, device.kind, device.limit) == (address, Kind.EXTERNAL, 100 * MIB)
        assert external.listed()[0] == ExternalWorker(
            address, ExternalState.USABLE, "", "7.0.0", 1, device.total
        )
        assert device.total > 100 * MIB


@pytest.mark.llama
async def test_a_busy_worker_is_distinguished_from_a_dead_one(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as address:
        async with occupied(address):
            busy = await look("127.0.0.1", int(address.rpartition(":")[2]), OURS)
            assert busy.state is ExternalState.BUSY and "serves another client" in busy.reason
        free = await look("127.0.0.1", int(address.rpartition(":")[2]), OURS)
        assert free.state is ExternalState.USABLE, "the failed probe does not block the worker"


@pytest.mark.llama
async def test_incompatible_and_forbidden_workers_are_listed_and_not_used(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as address:
        port = int(address.rpartition(":")[2])
        other = await look("127.0.0.1", port, Version(6, 1, 0))
        assert other.state is ExternalState.REFUSED
        assert "speaks version 7.0.0 of the RPC protocol, but the llama.cpp here 6.1.0" in other.reason
        async with watched(workers(address, allowed=False)) as external:
            await until(lambda: external.listed()[0].state is ExternalState.REFUSED)
            assert "llama.allow_plain_workers" in external.listed()[0].reason
            assert external.listed()[0].version == "7.0.0"
            assert external.devices() == ()


def test_a_scan_covers_only_the_private_networks_of_this_machine() -> None:
    hosts = hosts_beside(["192.168.7.20", "192.168.7.21", "fe80::1", "127.0.0.1", "8.8.8.8"])
    assert len(hosts) == 254 and {host.rpartition(".")[0] for host in hosts} == {"192.168.7"}
    assert len(hosts_beside(f"10.0.{net}.1" for net in range(40))) == 4 * 254


@pytest.mark.llama
async def test_a_scan_finds_free_and_busy_workers_and_skips_those_in_use(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as free, started(llama, folder) as busy, occupied(busy):
        ports = [int(address.rpartition(":")[2]) for address in (free, busy)]
        found = await scan(["127.0.0.1"], [*ports, 1], OURS, ["127.0.0.1:1"])
        assert [(worker.address, worker.state) for worker in found] == [
            (free, ExternalState.USABLE),
            (busy, ExternalState.BUSY),
            ("127.0.0.1:1", ExternalState.TAKEN),
        ]
        assert await scan(["127.0.0.1"], [1], OURS) == ()


async def test_a_worker_in_use_is_not_probed() -> None:
    clients = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        writer.close()

    async with listening(count) as port:
        address = f"127.0.0.1:{port}"
        async with watched(workers(address, held=frozenset((address,)))) as external:
            await until(lambda: external.listed()[0].state is ExternalState.TAKEN)
            await asyncio.sleep(1.2)
        assert clients == 0


def plan_with_worker(model: Model, head: str, node: str, address: str, layers: int) -> Plan:
    """A plan with the last layers on an external worker of ``node`` and the others on the head.

    ``layers`` includes the output.
    """
    total = model.layers + 1
    base = plan(model, head)
    first = total - layers
    share = Share(node, address, first, total, 40 * MIB, 0, 0)
    return replace(base, host=replace(base.host, last=first), shares=(share,))


async def add_with_worker(cluster: AgentCluster, node: str, address: str, *, allowed: bool = True) -> Agent:
    llama = LlamaSettings(
        worker_port=0, server_port=0, threads=1, rpc_backends=(address,), allow_plain_workers=allowed
    )
    return await cluster.add(node, llama=llama)


@pytest.fixture
async def cluster(folder: Path, llama: Llama) -> AsyncIterator[AgentCluster]:
    cluster = AgentCluster(folder, llama)
    yield cluster
    await cluster.close()


def offers(cluster: AgentCluster, node: str) -> list[str]:
    """The addresses of the external workers that a node's record offers."""
    return [
        device.id
        for device in cluster.views[node].me.devices
        if device.kind is Kind.EXTERNAL and device.available
    ]


async def test_detection_of_the_own_protocol_version_is_retried(
    cluster: AgentCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [None, None, OURS]

    async def own_protocol(*_: object) -> Version | None:
        return answers.pop(0)

    monkeypatch.setattr(external_watch, "own_protocol", own_protocol)
    monkeypatch.setattr(external_watch, "_PROTOCOL_SECONDS", 0.01)
    async with listening(lambda reader, writer: writer.close()) as port:
        agent = await add_with_worker(cluster, "a", f"127.0.0.1:{port}")
        await until(lambda: agent.grants.external.listed()[0].state is ExternalState.REFUSED)
    assert not answers


@pytest.mark.llama
async def test_a_head_on_another_node_uses_an_external_worker_through_a_tunnel(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        await add_with_worker(cluster, "a", address)
        await cluster.add("b")
        await until(lambda: offers(cluster, "a") == [address])
        assert (await cluster.deploy("alone", plan(tiny, "b"))).ok
        assert (await cluster.deploy("far", plan_with_worker(tiny, "b", "a", address, 4))).ok
        far = await cluster.until("b", "far", State.READY)
        assert far.backend is Backend.SHARDED
        assert [(share.node, share.device) for share in far.placed] == [("b", "CPU"), ("a", address)]
        assert len(cluster.tunnels) == 1 and cluster.tunnels[0].open
        await cluster.until("b", "alone", State.READY)
        assert await answer(cluster.agents["b"], "far") == await answer(cluster.agents["b"], "alone")
        await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.TAKEN)
        # It serves one client, so the rest of its memory is not available.
        assert offers(cluster, "a") == []
        second = await cluster.call("l", "a", "reserve", Reserve(TERM, "more", "a", {address: MIB}))
        assert not second.ok and "one deployment at a time" in second.reason
        with pytest.raises(PeerError):
            await cluster.servers["a"].workers.address("b", "alone", address)
        assert (await cluster.agents["b"].deployments.unload("far", "done")).ok
        await until(lambda: offers(cluster, "a") == [address])


@pytest.mark.llama
async def test_a_head_on_the_same_node_connects_directly(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        agent = await add_with_worker(cluster, "a", address)
        await until(lambda: offers(cluster, "a") == [address])
        assert (await cluster.deploy("near", plan_with_worker(tiny, "a", "a", address, 7))).ok
        near = await cluster.until("a", "near", State.READY)
        assert near.backend is Backend.SHARDED and cluster.tunnels == []
        assert await answer(agent, "near")


@pytest.mark.llama
async def test_a_deployment_on_a_busy_worker_fails_with_the_reason(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        await add_with_worker(cluster, "a", address)
        await until(lambda: offers(cluster, "a") == [address])
        async with occupied(address):
            await cluster.deploy("d", plan_with_worker(tiny, "a", "a", address, 4))
            failed = await cluster.until("a", "d", State.FAILED)
            assert "serves another client" in failed.reason
            await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.BUSY)
            assert offers(cluster, "a") == []


@pytest.mark.llama
async def test_a_worker_that_is_not_allowed_is_not_a_device(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    async with started(llama, folder) as address:
        await add_with_worker(cluster, "a", address, allowed=False)
        await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.REFUSED)
        assert offers(cluster, "a") == []
        refused = await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "a", {address: MIB}))
        assert not refused.ok


async def test_the_watch_continues_after_an_unforeseen_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_INTERVAL", 0.01)
    failures = [RuntimeError("unforeseen")]

    def taken() -> frozenset[str]:
        if failures:
            raise failures.pop()
        return frozenset()

    external = ExternalWorkers(["127.0.0.1:1"], True, {}, taken, lambda: None)
    external.use_version(OURS)
    async with watched(external):
        await until(lambda: external.listed()[0].state is ExternalState.DEAD)
    assert not failures


async def test_workers_named_by_requests_are_listed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[str] = set()
    external = ExternalWorkers([], True, {}, lambda: frozenset(taken), lambda: None)
    external.use_version(OURS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    external.add([address, "nonsense"])
    async with watched(external):
        dead, wrong = await external.settled([address, "nonsense"], 5.0)
        assert dead.state is ExternalState.DEAD and "nothing listens" in dead.reason
        assert wrong.state is ExternalState.REFUSED and "HOST:PORT" in wrong.reason
        monkeypatch.setattr(workers_module, "NAMED_SECONDS", 0.0)
        external.add([address, "nonsense"])
        await until(lambda: external.listed() == ())
    monkeypatch.setattr(workers_module, "NAMED_SECONDS", 60.0)
    external.add([f"10.0.0.{number}:1" for number in range(MOST_NAMED + 1)])
    assert len(external.listed()) == MOST_NAMED
    (last,) = await external.settled([f"10.0.0.{MOST_NAMED}:1"], 0.0)
    assert last.state is ExternalState.REFUSED and "already" in last.reason
