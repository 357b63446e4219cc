"""Overhead of the relay compared with nginx and with no proxy: `python -m tests.bench.relay`.

llama-swap is measured too if it is installed.

One run measures 64 concurrent streams at a steady rate (each stream is checked), the proxy's CPU time per
streamed token, the time to the first byte of consecutive requests, and requests per second. Each value is
compared with that of nginx and with the goal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from tests.bench.relay_engine import EVENTS, PACE
from tests.doubles import free_ports

STREAMS = 64
TOKENS = 150
FIRST_BYTES = 300
REQUESTS = 1500
GOAL = 1.5
"""Goal: the maximum ratio to a compiled reverse proxy."""
_NOTHING = 0.01
"""Values below this, in µs or ms, are too small to measure."""

_NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
_SWAP = """
logLevel: error
models:
  "bench:latest":
    cmd: sleep 100000
    proxy: http://127.0.0.1:{engine}
    checkEndpoint: none
    concurrencyLimit: 256
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A port to send requests to, and the processes between it and the engine."""

    name: str
    port: int
    between: tuple[psutil.Process, ...]

    def spent(self) -> float:
        """Return the CPU seconds used so far."""
        everyone = [p for process in self.between for p in (process, *process.children(recursive=True))]
        return sum(sum(p.cpu_times()[:2]) for p in everyone)


def body(**fields: object) -> bytes:
    message = {"role": "user", "content": "hello"}
    return json.dumps({"model": "bench:latest", "messages": [message], **fields}).encode()


class Connection:
    """A minimal client: one connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, header: str) -> None:
        """``header``: header lines of every request."""
        self._reader = reader
        self._writer = writer
        self._header = header.encode()

    @classmethod
    async def open(cls, port: int, header: str = "") -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20), header)

    def close(self) -> None:
        self._writer.close()

    async def ask(self, data: bytes) -> tuple[float, bytes]:
        """Send a request and return (seconds to the first byte of the body, body)."""
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        begun = time.perf_counter()
        self._writer.write(head + self._header + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in answer.split(b"\r\n")[0], answer
        if b"content-length" in answer:
            length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
            whole = await self._reader.readexactly(length)
            return time.perf_counter() - begun, whole
        first, parts = 0.0, []
        while size := int(await self._reader.readline(), 16):
            part = await self._reader.readexactly(size)
            first = first or time.perf_counter() - begun
            parts.append(part)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return first, b"".join(parts)


async def streams(target: Target) -> tuple[float, float]:
    """Run all streams concurrently, check them, and return (CPU µs per token, seconds)."""
    request = body(stream=True, max_tokens=TOKENS)
    connections = [await Connection.open(target.port) for _ in range(STREAMS)]
    before, begun = target.spent(), time.perf_counter()
    answers = await asyncio.gather(*(link.ask(request) for link in connections))
    took, spent = time.perf_counter() - begun, target.spent() - before
    assert took > (TOKENS - 1) * PACE, "the streams were faster than the engine"
    for opened in connections:
        opened.close()
    expected = [json.loads(event[6:]) for event in EVENTS[:TOKENS]]
    for _, answer in answers:
        events = [line[6:] for line in answer.split(b"\n\n") if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        assert [json.loads(event) for event in events[:-1]] == expected
    return spent * 1e6 / (STREAMS * TOKENS), took


async def first_byte(target: Target) -> tuple[float, float]:
    """Return (median, 99th percentile) in ms for consecutive requests."""
    connection = await Connection.open(target.port)
    request = body(stream=True, max_tokens=1)
    for _ in range(20):
        await connection.ask(request)
    times = [(await connection.ask(request))[0] * 1000 for _ in range(FIRST_BYTES)]
    connection.close()
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


async def requests(target: Target) -> float:
    """Return non-streamed requests per second with 64 callers."""
    request = body(stream=False, max_tokens=1)
    remaining = REQUESTS

    async def caller() -> None:
        nonlocal remaining
        connection = await Connection.open(target.port)
        while remaining > 0:
            remaining -= 1
            await connection.ask(request)
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(STREAMS)))
    return REQUESTS / (time.perf_counter() - begun)


@contextlib.contextmanager
def targets(folder: Path) -> Iterator[list[Target]]:
    """Start and yield all targets."""
    engine, nginx, a, b, peer_a, peer_b, swap = free_ports(7)
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, engine=engine, port=nginx))
    children: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> psutil.Process:
        children.append(subprocess.Popen(words))
        return psutil.Process(children[-1].pid)

    def module(name: str, *words: object) -> psutil.Process:
        return start(sys.executable, "-m", f"tests.bench.{name}", *(str(word) for word in words))

    try:
        module("relay_engine", engine)
        url = f"http://127.0.0.1:{engine}"
        node_a = module("relay_node", "a", a, peer_a, peer_b, url)
        node_b = module("relay_node", "b", b, peer_b, peer_a, url)
        proxy = start("/usr/sbin/nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log"))
        others: list[Target] = []
        if program := shutil.which("llama-swap"):
            (folder / "swap.yaml").write_text(_SWAP.format(engine=engine))
            place = ("--config", str(folder / "swap.yaml"), "--listen", f"127.0.0.1:{swap}")
            others.append(Target("llama-swap", swap, (start(program, *place),)))
        for port in (engine, nginx, a, b, *(target.port for target in others)):
            await_port(port)
        yield [
            Target("direct", engine, ()),
            Target("nginx", nginx, (proxy,)),
            Target("sollold, endpoint's node", b, (node_b,)),
            Target("sollold, another node", a, (node_a, node_b)),
            *others,
        ]
    finally:
        for child in children:
            child.terminate()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            child.kill()


def await_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


@dataclass(frozen=True, slots=True)
class Measured:
    """The values of one target. ``added``: ms to the first byte in addition to those without a proxy."""

    name: str
    per_token: float
    took: float
    first: float
    worst: float
    added: float
    rate: float

    def row(self) -> tuple[str, ...]:
        """Return the values as cells of a table."""
        numbers = (self.took, self.first, self.worst, self.added)
        return (self.name, f"{self.per_token:.1f}", *(f"{n:.2f}" for n in numbers), f"{self.rate:.0f}")


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of a value to that of nginx. Larger is worse."""

    quantity: str
    value: float

    @property
    def met(self) -> bool:
        """Return whether the ratio meets the goal."""
        return self.value <= GOAL


def ratios(measured: Measured, nginx: Measured) -> tuple[Ratio, ...]:
    """Compare a target with nginx in each quantity with a goal."""

    def times(mine: float, its: float) -> float:
        # Values too small to measure count as equal.
        mine, its = max(mine, _NOTHING), max(its, _NOTHING)
        return mine / its

    return (
        Ratio("cpu per token", times(measured.per_token, nginx.per_token)),
        Ratio("added first byte", times(measured.added, nginx.added)),
        Ratio("requests/s", times(nginx.rate, measured.rate)),
    )


async def measure(target: Target, base: float) -> Measured:
    """Measure a target. ``base``: ms to the first byte without a proxy; 0: this target has no proxy."""
    await streams(target)
    per_token, took = await streams(target)
    first, worst = await first_byte(target)
    rate = await requests(target)
    return Measured(target.name, per_token, took, first, worst, first - (base or first), rate)


async def compare(found: list[Target]) -> None:
    """Measure the targets and print the values with the verdict."""
    measured: list[Measured] = []
    for target in found:
        measured.append(await measure(target, measured[0].first if measured else 0.0))
    print(f"{STREAMS} concurrent streams, {TOKENS} tokens each, {1 / PACE:.0f} tokens per second and stream")
    head = ("", "µs cpu/token", "stream s", "1st byte ms", "p99 ms", "added ms", "requests/s")
    show([head, *(values.row() for values in measured)])
    print(f"\nratio to nginx (more is worse; goal: at most {GOAL:g})")
    nginx, ours = measured[1], measured[2:]
    beside = [ratios(target, nginx) for target in ours]
    names = ("", *(ratio.quantity for ratio in beside[0]), "verdict")
    rows = [
        (
            target.name,
            *(f"{r.value:.2f}" for r in compared),
            "met" if all(r.met for r in compared) else "missed",
        )
        for target, compared in zip(ours, beside, strict=True)
    ]
    show([names, *rows])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder, targets(Path(folder)) as found:
        uvloop.run(compare(found))


if __name__ == "__main__":
    main()
