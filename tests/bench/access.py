"""The cost per request of checking the Host header and an API key: `python -m tests.bench.access`.

Two open nodes and one that requires a key get requests in turn in one run. The difference between the open
ones is noise.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import uvloop

from sollold.api.http.hosts import Hosts
from tests.bench.relay import Connection, await_port, body, show
from tests.doubles import free_ports

ROUNDS = 30
REQUESTS = 60
AWAY = "X-Forwarded-For: 192.168.1.77\r\n"
NAMES = ("open", "open again", "with a key")


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[list[tuple[int, psutil.Process, str]]]:
    """Run the three nodes and yield the port, process and request header of each."""
    engine, *ports = free_ports(7)
    children = [subprocess.Popen([sys.executable, "-m", "tests.bench.relay_engine", str(engine)])]
    try:
        await_port(engine)
        found = []
        for number, name in enumerate(NAMES):
            http, peer = ports[2 * number : 2 * number + 2]
            words = [sys.executable, "-m", "tests.bench.relay_node", "b", str(http), str(peer), str(peer)]
            words.append(f"http://127.0.0.1:{engine}")
            words += [str(folder / "key")] if name == "with a key" else []
            children.append(subprocess.Popen(words))
            await_port(http)
            found.append((http, psutil.Process(children[-1].pid), AWAY))
        port, process, header = found[-1]
        found[-1] = (port, process, f"{header}Authorization: Bearer {(folder / 'key').read_text()}\r\n")
        yield found
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(10)


async def compare(found: list[tuple[int, psutil.Process, str]]) -> None:
    """Query the nodes in turn and print the medians of the differences in each round."""
    connections = [await Connection.open(port, header) for port, _, header in found]
    request = body(stream=True, max_tokens=1)
    first: list[list[float]] = [[] for _ in found]
    spent: list[list[float]] = [[] for _ in found]
    for turn in range(ROUNDS + 2):
        for place in sorted(range(len(found)), key=lambda index: (index + turn) % len(found)):
            process = found[place][1]
            before = sum(process.cpu_times()[:2])
            times = [(await connections[place].ask(request))[0] * 1e6 for _ in range(REQUESTS)]
            # The first two rounds are a warm-up.
            if turn >= 2:
                first[place].append(statistics.median(times))
                spent[place].append((sum(process.cpu_times()[:2]) - before) * 1e6 / REQUESTS)
    for connection in connections:
        connection.close()

    def difference(numbers: list[list[float]], place: int) -> str:
        return f"{statistics.median(a - b for a, b in zip(numbers[place], numbers[0], strict=True)):+.0f}"

    rows = [("", "1st byte µs", "beside open", "cpu µs/request", "beside open")]
    for place, name in enumerate(NAMES):
        rows.append(
            (
                name,
                f"{statistics.median(first[place]):.0f}",
                difference(first, place),
                f"{statistics.mean(spent[place]):.0f}",
                f"{statistics.mean(spent[place]) - statistics.mean(spent[0]):+.0f}",
            )
        )
    print(f"{ROUNDS} rounds of {REQUESTS} requests to each, in turn")
    show(rows)


def host_check() -> None:
    """Time the check of the Host header alone. It can't be disabled, so there is no reference."""
    hosts = Hosts(("*.example.com",), lambda: [f"node{number}" for number in range(20)])
    rows = [("Host", "µs")]
    for name in ("localhost:11435", "192.168.1.7:11435", "node19:11435", "a.example.com"):
        began = time.perf_counter()
        for _ in range(20_000):
            assert hosts.accepts(name)
        rows.append((name, f"{(time.perf_counter() - began) * 1e6 / 20_000:.2f}"))
    print()
    show(rows)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="access-bench-") as folder, nodes(Path(folder)) as found:
        uvloop.run(compare(found))
    host_check()


if __name__ == "__main__":
    main()
