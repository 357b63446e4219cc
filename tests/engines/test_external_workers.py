"""Workers that others started: looked at with a real handshake, held by one deployment at a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
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
async def listening(handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]):  # type: ignore[no-untyped-def]
    server = await asyncio.start_server(handle, "127.0.0.1", 0)  # type: ignore[arg-type]
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def test_what_does_not_listen_is_dead() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = await look("127.0.0.1", free.getsockname()[1], OURS)
    assert found.state is ExternalState.DEAD and "nothing listens" in found.reason
    nowhere = await look("no-such-host.invalid", 50052, OURS)
    assert nowhere.state is ExternalState.DEAD


async def test_another_program_is_no_worker() -> None:
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
    made = ExternalWorkers([address], allowed, {address: 100 * MIB}, lambda: held, lambda: None)
    made.use_version(OURS)
    return made


@contextlib.asynccontextmanager
async def watched(plain: ExternalWorkers) -> AsyncIterator[ExternalWorkers]:
    task = asyncio.create_task(plain.run())
    try:
        yield plain
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_address_that_is_none_is_listed_with_the_reason() -> None:
    async with watched(workers("somewhere")) as plain:
        (told,) = plain.listed()
        assert told.state is ExternalState.REFUSED and "'somewhere' is not HOST:PORT" in told.reason
        assert plain.devices() == ()


@pytest.mark.llama
async def test_a_free_worker_says_what_it_has(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as address, watched(workers(address)) as plain:
        await until(lambda: plain.listed()[0].state is ExternalState.USABLE)
        (device,) = plain.devices()
        assert (device.id, device.kind, device.limit) == (address, Kind.EXTERNAL, 100 * MIB)
        assert plain.listed()[0] == ExternalWorker(
            address, ExternalState.USABLE, "", "7.0.0", 1, device.total
        )
        assert device.total > 100 * MIB


@pytest.mark.llama
async def test_a_busy_worker_is_told_from_a_dead_one(folder: Path, llama: Llama) -> None:
    async with started(llama, folder) as address:
        async with occupied(address):
            busy = await look("127.0.0.1", int(address.rpartition(":")[2]), OURS)
            assert busy.state is ExternalState.BUSY and "serves another client" in busy.reason
        free = await look("127.0.0.1", int(address.rpartition(":")[2]), OURS)
        assert free.state is ExternalState.USABLE, "what looked at it in vain does not stand in its way"


@pytest.mark.llama
async def test_another_protocol_and_a_forbidden_worker_are_listed_and_not_used(
    folder: Path, llama: Llama
) -> None:
    async with started(llama, folder) as address:
        port = int(address.rpartition(":")[2])
        other = await look("127.0.0.1", port, Version(6, 1, 0))
        assert other.state is ExternalState.REFUSED
        assert "speaks version 7.0.0 of the RPC protocol, but the llama.cpp here 6.1.0" in other.reason
        async with watched(workers(address, allowed=False)) as plain:
            await until(lambda: plain.listed()[0].state is ExternalState.REFUSED)
            assert "llama.allow_plain_workers" in plain.listed()[0].reason
            assert plain.listed()[0].version == "7.0.0"
            assert plain.devices() == ()


def test_a_scan_looks_at_the_neighbours_alone() -> None:
    hosts = hosts_beside(["192.168.7.20", "192.168.7.21", "fe80::1", "127.0.0.1", "8.8.8.8"])
    assert len(hosts) == 254 and {host.rpartition(".")[0] for host in hosts} == {"192.168.7"}
    assert len(hosts_beside(f"10.0.{net}.1" for net in range(40))) == 4 * 254


@pytest.mark.llama
async def test_a_scan_finds_free_and_busy_workers_and_leaves_those_in_use_alone(
    folder: Path, llama: Llama
) -> None:
    async with started(llama, folder) as free, started(llama, folder) as busy, occupied(busy):
        ports = [int(address.rpartition(":")[2]) for address in (free, busy)]
        found = await scan(["127.0.0.1"], [*ports, 1], OURS, ["127.0.0.1:1"])
        assert [(one.address, one.state) for one in found] == [
            (free, ExternalState.USABLE),
            (busy, ExternalState.BUSY),
            ("127.0.0.1:1", ExternalState.TAKEN),
        ]
        assert await scan(["127.0.0.1"], [1], OURS) == ()


async def test_one_that_a_deployment_holds_is_not_looked_at() -> None:
    clients = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        writer.close()

    async with listening(count) as port:
        address = f"127.0.0.1:{port}"
        async with watched(workers(address, held=frozenset((address,)))) as plain:
            await until(lambda: plain.listed()[0].state is ExternalState.TAKEN)
            await asyncio.sleep(1.2)
        assert clients == 0


def over(model: Model, head: str, node: str, address: str, layers: int) -> Plan:
    """``layers`` and the output on an external worker that ``node`` names, the rest on the head."""
    total = model.layers + 1
    made = plan(model, head)
    first = total - layers
    share = Share(node, address, first, total, 40 * MIB, 0, 0)
    return replace(made, host=replace(made.host, last=first), shares=(share,))


async def named(cluster: AgentCluster, node: str, address: str, *, allowed: bool = True) -> Agent:
    llama = LlamaSettings(
        worker_port=0, server_port=0, threads=1, rpc_backends=(address,), allow_plain_workers=allowed
    )
    return await cluster.add(node, llama=llama)


@pytest.fixture
async def cluster(folder: Path, llama: Llama) -> AsyncIterator[AgentCluster]:
    made = AgentCluster(folder, llama)
    yield made
    await made.close()


def offers(cluster: AgentCluster, node: str) -> list[str]:
    return [one.id for one in cluster.views[node].me.devices if one.kind is Kind.EXTERNAL and one.available]


async def test_a_protocol_that_was_not_learnt_at_first_is_asked_for_again(
    cluster: AgentCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [None, None, OURS]

    async def own_protocol(*_: object) -> Version | None:
        return answers.pop(0)

    monkeypatch.setattr(external_watch, "own_protocol", own_protocol)
    monkeypatch.setattr(external_watch, "_PROTOCOL_SECONDS", 0.01)
    async with listening(lambda reader, writer: writer.close()) as port:
        agent = await named(cluster, "a", f"127.0.0.1:{port}")
        await until(lambda: agent.grants.external.listed()[0].state is ExternalState.REFUSED)
    assert not answers


@pytest.mark.llama
async def test_a_head_elsewhere_reaches_it_through_the_node_that_names_it(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        await named(cluster, "a", address)
        await cluster.add("b")
        await until(lambda: offers(cluster, "a") == [address])
        assert (await cluster.deploy("alone", plan(tiny, "b"))).ok
        assert (await cluster.deploy("far", over(tiny, "b", "a", address, 4))).ok
        far = await cluster.until("b", "far", State.READY)
        assert far.backend is Backend.SHARDED
        assert [(one.node, one.device) for one in far.placed] == [("b", "CPU"), ("a", address)]
        assert len(cluster.tunnels) == 1 and cluster.tunnels[0].open
        await cluster.until("b", "alone", State.READY)
        assert await answer(cluster.agents["b"], "far") == await answer(cluster.agents["b"], "alone")
        await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.TAKEN)
        # It serves one client, so nobody else gets what is left of its memory.
        assert offers(cluster, "a") == []
        again = await cluster.call("l", "a", "reserve", Reserve(TERM, "more", "a", {address: MIB}))
        assert not again.ok and "one deployment at a time" in again.reason
        with pytest.raises(PeerError):
            await cluster.servers["a"].workers.address("b", "alone", address)
        assert (await cluster.agents["b"].deployments.unload("far", "done")).ok
        await until(lambda: offers(cluster, "a") == [address])


@pytest.mark.llama
async def test_the_node_that_names_it_connects_itself(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        agent = await named(cluster, "a", address)
        await until(lambda: offers(cluster, "a") == [address])
        assert (await cluster.deploy("near", over(tiny, "a", "a", address, 7))).ok
        near = await cluster.until("a", "near", State.READY)
        assert near.backend is Backend.SHARDED and cluster.tunnels == []
        assert await answer(agent, "near")


@pytest.mark.llama
async def test_a_deployment_that_finds_it_busy_fails_at_once_and_says_why(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    cluster.models[tiny.digest] = tiny
    async with started(llama, folder) as address:
        await named(cluster, "a", address)
        await until(lambda: offers(cluster, "a") == [address])
        async with occupied(address):
            await cluster.deploy("d", over(tiny, "a", "a", address, 4))
            failed = await cluster.until("a", "d", State.FAILED)
            assert "serves another client" in failed.reason
            await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.BUSY)
            assert offers(cluster, "a") == []


@pytest.mark.llama
async def test_without_leave_it_is_no_device(
    cluster: AgentCluster, folder: Path, llama: Llama, tiny: Model
) -> None:
    async with started(llama, folder) as address:
        await named(cluster, "a", address, allowed=False)
        await until(lambda: cluster.views["a"].me.plain[0].state is ExternalState.REFUSED)
        assert offers(cluster, "a") == []
        refused = await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "a", {address: MIB}))
        assert not refused.ok


async def test_requests_may_name_workers_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[str] = set()
    made = ExternalWorkers([], True, {}, lambda: frozenset(taken), lambda: None)
    made.use_version(OURS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    made.add([address, "nonsense"])
    async with watched(made):
        dead, wrong = await made.settled([address, "nonsense"], 5.0)
        assert dead.state is ExternalState.DEAD and "nothing listens" in dead.reason
        assert wrong.state is ExternalState.REFUSED and "HOST:PORT" in wrong.reason
        monkeypatch.setattr(workers_module, "NAMED_SECONDS", 0.0)
        made.add([address, "nonsense"])
        await until(lambda: made.listed() == ())
    monkeypatch.setattr(workers_module, "NAMED_SECONDS", 60.0)
    made.add([f"10.0.0.{number}:1" for number in range(MOST_NAMED + 1)])
    assert len(made.listed()) == MOST_NAMED
    (last,) = await made.settled([f"10.0.0.{MOST_NAMED}:1"], 0.0)
    assert last.state is ExternalState.REFUSED and "already" in last.reason
