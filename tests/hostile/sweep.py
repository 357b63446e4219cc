"""Hostile requests and connections against real daemons that serve a real model meanwhile.

Two daemons on separate machines, each a cluster of its own, and a machine without a daemon. ``well`` streams
to local callers while the stranger's machine sends hostile requests to all its routes and opens hostile
connections. ``spare`` gets the same requests from its own machine, where a caller may do anything: drain,
unload, delete. Required: no error that is the daemon's fault, no stall of the event loop, no growth, and
exact streams.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.chaos.callers import DIALECTS, Caller, Stream
from tests.chaos.round import OWN_FAULTS
from tests.daemons import Cluster, Node, until
from tests.hostile import connections
from tests.hostile.attack import Tally, attack
from tests.hostile.requests import Requests

MODEL = "count"
LONGEST_STOP = 0.05
"""Seconds for which a caller may stall the event loop."""
HELD = 12.0
"""Seconds for which hostile connections are kept open: longer than the timeout for a header."""
GROWTH = 96.0
"""MB by which a daemon may grow after the first quarter of the requests: it stores responses of 64 MB."""
SETTINGS: dict[str, Any] = {"placement.context": 1024, "placement.slots": 4, "cluster.mdns": "off"}
STREAMING = ("ollama chat", "openai chat", "anthropic")


@dataclass(frozen=True, slots=True)
class Stop:
    """A stall of a daemon's event loop: total seconds, CPU seconds, and those of garbage collection."""

    node: str
    stopped: float
    worked: float
    collected: float
    where: str

    def __str__(self) -> str:
        spent = f"{self.worked * 1000:.0f} CPU, {self.collected * 1000:.0f} garbage collection"
        return f"{self.node} stalled for {self.stopped * 1000:.0f} ms ({spent}): {self.where}"


@dataclass(slots=True)
class Outcome:
    """The results of a sweep.

    Attributes:
        memory: MB of each daemon after a quarter of the requests, after all, and after the connections.
        files: open files at the same times.
        at_first: number of stalls of each daemon before the first request.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    stops: list[Stop] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    at_first: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    longest_stop: float = LONGEST_STOP

    def report(self) -> list[str]:
        """Return the report as lines."""
        exact = sum(stream.done and not stream.what_is_wrong() for stream in self.streams)
        words = sum(len(stream.words) for stream in self.streams)
        lines = [f"{self.seconds:.0f} s; {exact} of {len(self.streams)} streams exact, {words} words"]
        for name, tally in self.tallies.items():
            counts = ", ".join(f"{status}: {count}" for status, count in sorted(tally.statuses.items()))
            lines.append(
                f"{name}: {tally.statuses.total()} requests, slowest {tally.slowest:.1f} s; {counts}"
            )
            lines += [f"  {count} × {text}" for text, count in tally.excuses.most_common(20)]
        lines.append(f"connections: {dict(self.kinds)}")
        for name, sizes in self.memory.items():
            files = " → ".join(map(str, self.files[name]))
            lines.append(f"{name}: {' → '.join(f'{size:.0f}' for size in sizes)} MB, {files} open files")
        longest = sorted(self.stops, key=lambda stop: -stop.worked)[:12]
        lines += ["longest stops:", *(f"  {stop}" for stop in longest)]
        return [*lines, *(f"WRONG {text}" for text in self.wrong)]


def sweep(
    llama: Llama,
    folder: Path,
    *,
    requests: int,
    connected: int,
    seed: int,
    held: float = HELD,
    longest_stop: float = LONGEST_STOP,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Send ``requests`` and open ``connected`` connections. Call it in the main thread."""
    outcome = Outcome(longest_stop=longest_stop)
    with Cluster(3, folder, llama, settings=SETTINGS, start=False) as cluster:
        well, spare = cluster[0], cluster[1]
        for node in (well, spare):
            write(node.models / "count.gguf", Recital(counting(320), name=MODEL))
            node.program = ("-m", "tests.hostile.watched", str(node.folder / "stops"))
            node.start()
        for node in (well, spare):
            _load(node)
            outcome.at_first[node.name] = len((node.folder / "stops").read_text().splitlines())
        callers = [
            Caller(well, dialect, MODEL, (60, 200), seed)
            for dialect in DIALECTS if dialect.name in STREAMING
        ]  # fmt: skip
        for caller in callers:
            caller.start()
        began = time.monotonic()
        try:
            _attack(cluster, outcome, requests, connected, seed, held, say)
        finally:
            for caller in callers:
                caller.stop()
            for caller in callers:
                caller.join(120)
        outcome.seconds = time.monotonic() - began
        outcome.streams = [stream for caller in callers for stream in caller.streams]
        _evaluate(outcome, (well, spare), [caller.name for caller in callers if caller.is_alive()])
    return outcome


def _attack(
    cluster: Cluster,
    outcome: Outcome,
    requests: int,
    connected: int,
    seed: int,
    held: float,
    say: Callable[[str], None],
) -> None:
    """Send a quarter of the requests first, after which memory must not grow any more."""
    well, spare, stranger = cluster
    tallies = outcome.tallies = {"a stranger": Tally(), "a caller who may do all": Tally()}
    routes = _routes(well)
    places = [
        (stranger, well, well.address, Requests(routes, MODEL, seed)),
        (spare, spare, "127.0.0.1", Requests(routes, MODEL, seed + 1)),
    ]
    for share in (requests // 4, requests - requests // 4):
        threads = [
            InNetwork(place.network(), partial(attack, host, node.http, made, share // 2, tally))
            for (place, node, host, made), tally in zip(places, tallies.values(), strict=True)
        ]  # fmt: skip
        for thread in threads:
            thread.finish()
        _record_size(outcome, (well, spare))
        say(f"{sum(tally.statuses.total() for tally in tallies.values())} requests")
    target = connections.Target(well.address, well.http, well.peer, MODEL)
    done = InNetwork(stranger.network(), lambda: connections.connect(target, connected, seed, held)).finish()
    outcome.kinds = Counter(done)
    _settled(well)
    _record_size(outcome, (well, spare))


class InNetwork(threading.Thread):
    """Runs a coroutine on its own event loop in a machine's network namespace."""

    def __init__(
        self, network: AbstractContextManager[None], make: Callable[[], Coroutine[Any, Any, Any]]
    ) -> None:
        super().__init__(daemon=True)
        self._network = network
        self._make = make
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._network:
                self._result = asyncio.run(self._make())
        except BaseException as error:
            self._error = error

    def finish(self) -> Any:
        """Wait for the end and return the result or raise the error."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def _load(node: Node) -> None:
    until(lambda: MODEL in node.ask("GET", "/api/tags").body.decode() if node.state() else False, "the model")
    until(
        lambda: node.ask("POST", "/api/generate", {"model": MODEL, "keep_alive": -1}).status == 200, "loaded"
    )


def _routes(node: Node) -> list[tuple[str, str]]:
    """Return the routes of ``/openapi.json``."""
    paths = node.ask("GET", "/openapi.json").json["paths"]
    return [(method.upper(), path) for path, several in paths.items() for method in several]


def _status(node: Node, key: str) -> float:
    assert node.process is not None
    text = Path(f"/proc/{node.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(key))


def _open_files(node: Node) -> int:
    assert node.process is not None
    return len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))


def _record_size(outcome: Outcome, nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        assert node.process is not None
        node.process.send_signal(signal.SIGUSR2)
    time.sleep(1)
    for node in nodes:
        outcome.memory.setdefault(node.name, []).append(_status(node, "VmRSS"))
        outcome.files.setdefault(node.name, []).append(_open_files(node))


def _settled(node: Node) -> None:
    """Wait until the connections of the hostile callers are closed."""
    before = _open_files(node)
    until(lambda: _open_files(node) <= max(60, before // 4), "the connections are closed", 30)


def _evaluate(outcome: Outcome, nodes: tuple[Node, ...], hanging: list[str]) -> None:
    wrong = outcome.wrong
    wrong += [f"{name} is still waiting" for name in hanging]
    for tally in outcome.tallies.values():
        wrong += [
            f"{tally.excuses[excuse]} × {excuse}, once for {sent}" for excuse, sent in tally.wrong.items()
        ]
    wrong += [
        f"stream {stream.dialect.name}: {stream.error or stream.what_is_wrong()}"
        for stream in outcome.streams
        if stream.error or stream.what_is_wrong()
    ]
    for node in nodes:
        for line in (node.folder / "stops").read_text().splitlines()[outcome.at_first[node.name] :]:
            outcome.stops.append(Stop(node.name, **json.loads(line)))
        first, *_, last = outcome.memory[node.name]
        if last - first > GROWTH:
            wrong.append(f"{node.name} has grown from {first:.0f} MB to {last:.0f} MB")
        wrong += [
            f"{node.name} logged: {line}"
            for line in node.log().splitlines()
            if any(words in line for words in OWN_FAULTS)
        ]
        if node.process is None or node.process.poll() is not None:
            wrong.append(f"{node.name} has ended")
    wrong += [str(stop) for stop in outcome.stops if stop.worked > outcome.longest_stop]
