"""A program for the cluster tests: a node without models that logs every change of its view.

``python -m tests.cluster.member STATE LOG [key=value…]`` with the fields of ``[cluster]`` as keys. Each line
of LOG is JSON: time (seconds of the monotonic clock, which all processes of a machine share), names of the
live nodes, name of the leader, term, ids of the linked nodes. SIGTERM makes it leave, SIGUSR1 makes it write
its CPU seconds to LOG.cpu.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.rpc_server import RpcServer
from sollold.settings.schema import ClusterSettings


async def main(state: Path, log: Path, *options: str) -> None:
    settings = msgspec.convert(
        {key: value.split(",") if key in ("seeds", "interfaces") else value for key, _, value in
         (option.partition("=") for option in options)},
        ClusterSettings, strict=False,
    )  # fmt: skip
    state.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240
    identity = Identity(NodeKey.load(state), Tokens.read(settings.token))
    record = Record(
        node=identity.node, name=state.name, version=0, addresses=(), http_port=1, peer_port=0, release="0"
    )
    node = ClusterNode(settings, identity, record, RpcServer(identity), state)
    out = log.open("a", buffering=1)
    last: list[object] = []

    def write() -> None:
        nonlocal last
        leader = node.record(node.leader().leader)
        names = sorted(record.name for record in node.live())
        seen = [names, leader.name if leader else "", node.leader().counter, list(node.status().links)]
        if seen != last:
            last = seen
            out.write(json.dumps([time.monotonic(), *seen]) + "\n")

    node.subscribe(write)
    await node.start()
    write()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(
        signal.SIGUSR1, lambda: (log.parent / f"{log.name}.cpu").write_text(str(time.process_time()))
    )
    await stop.wait()
    await node.close()


logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
uvloop.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
