"""Overhead of the tunnel: `python -m tests.bench.tunnel`.

A worker double, its owner's daemon and the head's daemon are separate processes on this machine. A client
sends requests directly and through the tunnel in turn, so that load on the machine affects both. A round trip
sends and receives the same number of bytes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc_server import RpcServer
from sollold.engines.llamacpp.tunnel import Tunnels
from tests.doubles import FakeView, record
from tests.keys import key

HEAD, OWNER = key(1), key(2)
SIZES = (64, 4096, 65536, 1 << 20)
TRIPS = {64: 1500, 4096: 1500, 65536: 500, 1 << 20: 60}
BULK = 512 << 20


def _worker_double() -> None:
    """Answer like a worker. A request is its length, the answer's length (8 bytes each), and data."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    buffer = bytearray(1 << 20)
    answer = bytes(1 << 20)
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client:
            while head := client.recv(16, socket.MSG_WAITALL):
                unread, wanted = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
                while unread and (got := client.recv_into(buffer, min(unread, len(buffer)))):
                    unread -= got
                client.sendall(answer[:wanted])


class _Worker:
    def __init__(self, port: int) -> None:
        self._port = port

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def gate(self, deployment: str) -> None:
        return None

    async def connected(self, deployment: str) -> bool:
        return True


async def _owner(worker: int) -> None:
    peers = RpcServer(Identity(OWNER, Tokens.read("")))
    peers.tunnel(_Worker(worker))
    print(await peers.start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()


async def _head(owner: int) -> None:
    reach = Dialer(Identity(HEAD, Tokens.read("")), lambda node: [("127.0.0.1", owner)])
    tunnel = await Tunnels(reach, FakeView(record(HEAD.node))).open("bench", OWNER.node)
    print(tunnel.port, flush=True)
    await asyncio.Event().wait()


@contextmanager
def _part(name: str, *arguments: int) -> Iterator[tuple[int, int]]:
    """Run a process of this module until the end of the block. Yield its port and pid."""
    command = [sys.executable, "-m", "tests.bench.tunnel", name, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield int(child.stdout.readline()), child.pid
        finally:
            child.kill()


def _connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def _trip(client: socket.socket, size: int, wanted: int) -> float:
    began = time.perf_counter()
    client.sendall(size.to_bytes(8, "big") + wanted.to_bytes(8, "big") + bytes(size))
    unread = wanted
    while unread:
        unread -= len(client.recv(min(unread, 1 << 20)))
    return time.perf_counter() - began


def _bulk(port: int) -> float:
    """Return the bytes per second of one large write with a final confirmation."""
    piece = os.urandom(1 << 20)
    with _connect(port) as client:
        _trip(client, 64, 1)
        began = time.perf_counter()
        client.sendall(BULK.to_bytes(8, "big") + (1).to_bytes(8, "big"))
        for _ in range(BULK // len(piece)):
            client.sendall(piece)
        client.recv(1)
        return BULK / (time.perf_counter() - began)


def _cpu(pid: int) -> float:
    fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()  # noqa: SIM115, PTH123
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    with (
        _part("worker") as (worker, _),
        _part("owner", worker) as (owner, owner_pid),
        _part("head", owner) as (tunnel, head_pid),
    ):
        ways = {"direct": worker, "tunnel": tunnel}
        print("Tunnel: round trips in microseconds, median (90th percentile)")
        print(f"{'bytes':>9}  {'direct':>16}  {'tunnel':>16}  {'added':>7}")
        for size in SIZES:
            taken: dict[str, list[float]] = {way: [] for way in ways}
            # The double, like a worker, serves one client at a time, so blocks alternate.
            for _ in range(5):
                for way, port in ways.items():
                    with _connect(port) as client:
                        _trip(client, 64, 64)
                        taken[way] += [_trip(client, size, size) for _ in range(TRIPS[size] // 5)]
            middle = {way: statistics.median(times) * 1e6 for way, times in taken.items()}
            high = {way: statistics.quantiles(times, n=10)[-1] * 1e6 for way, times in taken.items()}
            columns = "  ".join(f"{middle[way]:7.0f} ({high[way]:6.0f})" for way in ways)
            print(f"{size:>9}  {columns}  {middle['tunnel'] - middle['direct']:7.0f}")
        rates = {way: max(_bulk(port) for _ in range(2)) for way, port in ways.items()}
        before = _cpu(owner_pid) + _cpu(head_pid)
        _bulk(tunnel)
        spent = (_cpu(owner_pid) + _cpu(head_pid) - before) / (BULK / 1e9)
        print(
            f"bulk: direct {rates['direct'] / 1e6:.0f} MB/s, tunnel {rates['tunnel'] / 1e6:.0f} MB/s; "
            f"both daemons together spend {spent:.2f} processor seconds a GB"
        )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "worker":
        _worker_double()
    else:
        uvloop.run({"owner": _owner, "head": _head}[sys.argv[1]](int(sys.argv[2])))
