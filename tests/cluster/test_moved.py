"""An address change of a machine must not stall requests on connections of the old address."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import pytest

from sollold.cluster.net.interfaces import InterfaceWatch
from sollold.cluster.net.open_sockets import OpenSockets
from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests import doubles, netns
from tests.daemons import Cluster, Node, until

MAX_SECONDS = 10.0
"""Seconds for an answer after a move on a busy machine; a hanging engine is detected after 17 s."""

needs_network = pytest.mark.skipif(bool(netns.available()), reason=netns.available())


def ask(node: Node, text: str) -> None:
    body = {"model": "count", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    reply = node.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.body


def noticed(node: Node, old_address: str) -> bool:
    return f"lost the address {old_address}" in node.log()


@pytest.mark.llama
@pytest.mark.cluster
@needs_network
def test_a_request_after_a_node_has_moved_does_not_wait_for_the_old_address(
    tmp_path: Path, llama: Llama
) -> None:
    model = Recital(counting(320), name="count", layers=3, width=256, hidden=40_960, heavy=True)
    settings = {"placement.context": 1024, "placement.slots": 2, "placement.ubatch": 32}
    with Cluster(2, tmp_path, llama, memory="125 MiB", settings=settings, start=False) as cluster:
        write(cluster[0].models / "count.gguf", model)
        for node in cluster:
            assert node.machine is not None
            # Leave only one path; otherwise the other one may be in use.
            node.machine.remove_address(f"{node.machine.address6}/64")
            node.start()
        cluster.together()
        until(lambda: b"count" in cluster[1].ask("GET", "/api/tags").body, "the model is listed")
        ask(cluster[0], "one")
        (loaded,) = cluster.deployments()
        head = next(node for node in cluster if node.name == loaded["node_name"])
        for turn, moved in enumerate((cluster[1 - head.index], head)):
            assert cluster.lan is not None and moved.machine is not None
            before, moved.address = moved.address, f"{cluster.lan.network}.{77 + turn}"
            moved.machine.remove_address(f"{before}/24")
            moved.machine.add_address(f"{moved.address}/24")
            for node in cluster:
                until(partial(noticed, node, before), "the move is noticed")
            began = time.monotonic()
            ask(cluster[1 - moved.index], "two")
            assert time.monotonic() - began < MAX_SECONDS
            assert all("produced no token" not in node.log() for node in cluster)


async def test_connections_are_cut_by_the_address_of_either_end() -> None:
    sockets, servers, watched, ended = OpenSockets(), [], [], []

    async def serve(name: str) -> tuple[str, int]:
        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(hold, name, 0)
        servers.append(server)
        return name, int(server.sockets[0].getsockname()[1])

    async def connect(name: str, own: str) -> None:
        host, port = await serve(name)
        reader, writer = await asyncio.open_connection(host, port, local_addr=(own, 0))
        raw = writer.get_extra_info("socket")._sock  # the loop returns a wrapper
        sockets.watch(raw)
        watched.append(own)
        await reader.read()
        ended.append((own, host))
        writer.close()

    waiting = [
        asyncio.create_task(connect(name, own))
        for name, own in (("127.0.0.2", "127.0.0.1"), ("127.0.0.3", "127.0.0.1"), ("127.0.0.4", "127.0.0.9"))
    ]
    await doubles.until(lambda: len(watched) == len(waiting))
    assert sockets.cut_hosts(other={"127.0.0.1", "127.0.0.9"}, own={"127.0.0.2", "127.0.0.3"}) == 0
    assert sockets.cut_hosts(other={"127.0.0.2"}) == 1
    await waiting[0]
    assert sockets.cut_hosts(own={"127.0.0.9"}) == 1
    await waiting[2]
    assert ended == [("127.0.0.1", "127.0.0.2"), ("127.0.0.9", "127.0.0.4")]
    waiting[1].cancel()
    for server in servers:
        server.close()


@pytest.mark.cluster
@needs_network
def test_an_unplugged_cable_loses_no_address() -> None:
    lost: list[frozenset[str]] = []

    async def watch(machine: netns.Machine) -> None:
        watched = InterfaceWatch((), lambda _: None, lost.append)
        await watched.start()
        machine.cut()
        await asyncio.sleep(1.0)
        assert not lost
        machine.restore()
        machine.remove_address(f"{machine.address}/24")
        await doubles.until(lambda: bool(lost))
        await watched.close()

    with netns.Lan(1) as lan:
        lan[0].call(lambda: asyncio.run(watch(lan[0])))
        assert lost == [frozenset({lan[0].address})]
