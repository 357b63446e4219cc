"""Speed of copying a 1 GB model between two nodes: ``python -m tests.bench.transfer`` prints a table.

The reference is the speed of plain sockets between the same two machines in the same run. If possible, the
machines are network namespaces joined by links with the speed of real networks, to which the goal applies.
Without a speed limit, the link is memory, and both ends share this machine's CPUs, which encrypt, decrypt and
hash twice the data that plain sockets only copy; that row shows up to which network speed a link can be
saturated. Without namespaces both nodes are on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue, NewTensor
from tests import netns

GB = 10**9
GOAL = 0.8
_PIECE = 1 << 20
_PLAIN = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
one, _ = listener.accept()
data = bytes(1 << 20)
left = int(sys.argv[2])
while left > 0:
    one.sendall(data[:min(left, len(data))])
    left -= len(data)
one.close()
"""
_TAKE = """
import socket, sys, time
begun = time.perf_counter()
one = socket.create_connection((sys.argv[1], int(sys.argv[2])))
view, got = memoryview(bytearray(1 << 20)), 0
while count := one.recv_into(view):
    got += count
print(got / (time.perf_counter() - begun))
"""


class Host:
    """The place of a process: a network namespace or this machine."""

    def __init__(self, machine: netns.Machine | None) -> None:
        self.machine = machine
        self.address = machine.address if machine else "127.0.0.1"

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        if self.machine is None:
            return subprocess.Popen(list(arguments), **options)
        return self.machine.popen(list(arguments), **options)


def plain(give: Host, take: Host, size: int) -> float:
    """Return the bytes per second of plain sockets."""
    giver = give.popen([sys.executable, "-c", _PLAIN, give.address, str(size)], stdout=subprocess.PIPE)
    try:
        assert giver.stdout is not None
        port = giver.stdout.readline().decode().strip()
        taker = take.popen([sys.executable, "-c", _TAKE, give.address, port], stdout=subprocess.PIPE)
        answer = taker.communicate(timeout=300)[0]
        giver.wait(timeout=30)
        return float(answer)
    finally:
        giver.kill()
        giver.wait()


@contextlib.contextmanager
def daemons(give: Host, take: Host, folder: Path, model: Path, ports: tuple[int, int]) -> Iterator[int]:
    """Run two daemons that know each other, the first with the model. Yield the second one's HTTP port."""
    started = []
    try:
        for index, host in enumerate((give, take)):
            home = folder / str(index)
            home.mkdir(parents=True)
            offset = 0 if host.machine else index
            seeds = [] if index == 0 else [f"{give.address}:{ports[1]}"]
            settings = home / "sollold.toml"
            settings.write_text(
                f'[node]\nname = "{index}"\nstate_dir = "{home}/state"\ncache_dir = "{home}/cache"\n'
                f'[http]\nhost = "{host.address}"\nport = {ports[0] + offset}\n'
                f'[cluster]\nhost = "{host.address}"\nport = {ports[1] + offset}\nmdns = false\n'
                'door = "open"\n'
                f"seeds = {json.dumps(seeds)}\n"
                f"[models]\nhuggingface = false\nollama_stores = [{json.dumps(str(home / 'none'))}]\n"
                f"folders = {json.dumps([str(model.parent)] if index == 0 else [])}\n"
                "[llama]\nbuild = false\n[ollama]\nenabled = false\n"
            )
            log = (home / "log").open("wb")
            command = [sys.executable, "-m", "sollold", "run", "--config", str(settings)]
            started.append(host.popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(home)}))
        yield ports[0] + (0 if take.machine else 1)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def pull(take: Host, port: int, name: str) -> float:
    """Return the seconds of ``/api/pull`` once the model is known and both nodes are measured."""
    end = time.monotonic() + 120
    while not (name in _ask(take, port, "GET", "/api/tags", None) and _measured(take, port)):
        if time.monotonic() > end:
            raise SystemExit(
                "the second daemon did not learn of the model, or the initial measurements did not end"
            )
        time.sleep(0.3)
    begun = time.perf_counter()
    lines = _ask(take, port, "POST", "/api/pull", {"model": name}).splitlines()
    taken = time.perf_counter() - begun
    if json.loads(lines[-1]).get("status") != "success":
        raise SystemExit(f"the transfer failed: {lines[-1]}")
    return taken


def _measured(host: Host, port: int) -> bool:
    """Return whether both nodes have measured their memory bandwidth."""
    nodes = json.loads(_ask(host, port, "GET", "/api/cluster", None))["nodes"]
    devices = [
        [device["bandwidth"] for device in node["devices"] if device["kind"] == "cpu"] for node in nodes
    ]
    return len(devices) == 2 and all(rates and min(rates) > 0 for rates in devices)


_ASK = """
import json, sys, urllib.request
body = sys.argv[3].encode() if sys.argv[3] else None
request = urllib.request.Request(sys.argv[2], data=body, method=sys.argv[1])
sys.stdout.write(urllib.request.urlopen(request, timeout=600).read().decode())
"""


def _ask(host: Host, port: int, method: str, path: str, body: object) -> str:
    url = f"http://{host.address}:{port}{path}"
    raw = json.dumps(body) if body is not None else ""
    asked = host.popen(
        [sys.executable, "-c", _ASK, method, url, raw], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    answer: bytes = asked.communicate(timeout=600)[0]
    return answer.decode()


def write_model(path: Path, size: int) -> None:
    """Write a model of about ``size`` bytes without sparse regions."""
    path.parent.mkdir(parents=True)
    rows = 4096
    count = max(1, size // (2 * 4096 * rows))
    noise = os.urandom(1 << 20)
    pieces = 2 * 4096 * rows // len(noise)
    tensors = [
        NewTensor(f"blk.{k}.x.weight", (4096, rows), 1, lambda: [noise] * pieces) for k in range(count)
    ]
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": count,
        "llama.embedding_length": 4096,
    }
    writer.write(path, metadata, tensors)


def row(name: str, give: Host, take: Host, size: int, ports: tuple[int, int], *, goal: bool = True) -> bool:
    # Use tmpfs if it has room, since a disk would be slower than a fast link.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 3 * size
    with tempfile.TemporaryDirectory(prefix="sollold-bench-", dir=memory if roomy else None) as made:
        folder = Path(made)
        model = folder / "give" / "bench.gguf"
        write_model(model, size)
        first = plain(give, take, model.stat().st_size)
        with daemons(give, take, folder, model, (28435, 28535)) as port:
            taken = pull(take, port, "bench:latest")
        second = plain(give, take, model.stat().st_size)
    best = max(first, second)
    rate = size / taken
    met = rate / best >= GOAL
    verdict = f"{GOAL:6.2f}  {'met' if met else 'MISSED'}" if goal else "  none"
    print(f"{name:24} {best / 1e6:12.0f} {rate / 1e6:12.0f} {rate / best:7.2f} {verdict}", flush=True)
    return met or not goal


def main() -> int:
    """Return exit status 1 if the goal is missed on any network link."""
    parser = argparse.ArgumentParser(prog="tests.bench.transfer", description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, help="GB")
    options = parser.parse_args()
    size = int(options.size * GB)
    print(f"{'link':24} {'plain MB/s':>12} {'model MB/s':>12} {'ratio':>7} {'goal':>6}", flush=True)
    if why := netns.available():
        print(f"(no namespaces: {why}; on loopback)")
        row("loopback", Host(None), Host(None), size, (28435, 28535), goal=False)
        return 0
    with netns.Lan(2) as lan:
        give, take = Host(lan[0]), Host(lan[1])
        row("memory", give, take, size, (28435, 28535), goal=False)
        met = True
        for rate in ("1", "2.5"):
            for machine in lan:
                limit = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{rate}gbit"]
                if (
                    not shutil.which("tc")
                    or machine.run([*limit, "burst", "1m", "latency", "50ms"]).returncode
                ):
                    print("(the link can't be limited here: no goal applies)")
                    return 0
            met = row(f"{rate} Gbit/s", give, take, size, (28435, 28535)) and met
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
