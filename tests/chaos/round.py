"""A chaos run: a cluster, callers, successive faults, and checks at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.chaos.callers import DIALECTS, HUNG, Caller, Stream
from tests.chaos.faults import SMALL_DISK, STOP_SECONDS, Done, Faults, engines
from tests.daemons import Cluster, Node, until
from tests.single_server import single_server

MODEL = "count"
TEXT = 320
RECITAL = Recital(counting(TEXT), name=MODEL, layers=3, width=256, hidden=40_960, heavy=True)
"""About 100 MB; each feed-forward matrix is large enough for the workers' cache."""
MEMORY = "125 MiB"
"""Memory that a node may grant: the model needs two nodes."""
MEMORY_OF_ALL = "75 MiB"
"""The same if the model is to need all three nodes."""
MAX_GROWTH = 64.0
"""MB by which a daemon may grow until the end."""
SETTINGS: dict[str, Any] = {
    "placement.context": 768,
    "placement.slots": len(DIALECTS),
    "placement.ubatch": 32,
    "serving.stall": 6,
    "serving.drain_limit": 3,
    "serving.recover_limit": 150,
}
STREAMS, WORDS_BEFORE = sum(dialect.streamed for dialect in DIALECTS), 100
"""Concurrent streams, and roughly the number of words of each before a fault."""
SETTLE_SECONDS = 170.0
OWN_FAULTS = ("internal error", "Traceback (most recent call last)", "never retrieved", "never awaited")
"""Words that must not occur in a daemon's log."""
PAUSE = 1.0
"""Seconds of silence from which a stream counts as affected by a fault."""


@dataclass(slots=True)
class FaultResult:
    """A fault and its effects, in seconds.

    Attributes:
        active: streams that were running when it was injected.
        waits: from the fault to the next word, of the affected streams at nodes that were not hurt.
        settled: from the fault until every caller received words again; infinite if that never happened.
    """

    fault: Done
    active: list[Stream]
    waits: list[float] = field(default_factory=list)
    settled: float = 0.0


@dataclass(slots=True)
class Outcome:
    """The results of a run."""

    load: float
    """Seconds that a single llama-server needs to load the model."""
    read: float
    """Seconds that it then needs to process the prompts of resumed streams."""
    results: list[FaultResult] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    hurt: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """Descriptions of violations."""
    seconds: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)
    """MB of each daemon at the start and at the end."""

    def may_err(self, stream: Stream) -> bool:
        """Return whether the called node was hurt during the stream."""
        spans = self.hurt.get(stream.node.name, [])
        return any(begin <= stream.ended and stream.began <= end for begin, end in spans)

    def verdict(self, stream: Stream) -> str:
        """``exact``, ``resumed`` (and exact), ``allowed`` (a permitted error), or the violation."""
        if stream.hung:
            return stream.error
        if problem := stream.what_is_wrong():
            return problem
        if not stream.error:
            return "resumed" if stream.resumed else "exact"
        return "allowed" if self.may_err(stream) and stream.clear else stream.error


def run(
    llama: Llama,
    folder: Path,
    *,
    faults: int,
    seed: int,
    short: bool = False,
    needs_all: bool = False,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Outcome:
    """Inject ``faults`` faults, for at most ``seconds``, and return the outcome.

    ``needs_all``: the model needs every node, so that each fault interrupts it until the node is back.

    Call it in the main thread, since the daemons end with the thread that started them.
    """
    model = folder / "count.gguf"
    write(model, RECITAL)
    single = [_measure_single(llama, model) for _ in range(3)]
    outcome = Outcome(*(statistics.median(column) for column in zip(*single, strict=True)))
    reads = f"and reads {STREAMS} answers of {WORDS_BEFORE} words in {outcome.read:.2f} s"
    say(f"a single llama-server loads the model in {outcome.load:.2f} s {reads}")
    settings = SETTINGS | {"llama.worker_cache_limit": "200 MB"}
    memory = MEMORY_OF_ALL if needs_all else MEMORY
    with Cluster(3, folder, llama, memory=memory, settings=settings, start=False) as cluster:
        for node in cluster.nodes[:2]:
            (node.models / "count.gguf").symlink_to(model)
        if not short:
            cluster[2].limit_disk(SMALL_DISK)
            cluster[1].limit_disk(SMALL_DISK)
        for node in cluster:
            node.start()
        cluster.together()
        began = time.monotonic()
        callers = [
            Caller(
                cluster[index % 3],
                dialect,
                MODEL,
                (80, 220) if dialect.streamed else (30, 100),
                seed + index,
            )
            for index, dialect in enumerate(DIALECTS)
        ]
        for caller in callers:
            caller.start()
        try:
            injector = Faults(cluster, seed, short=short, needs_all=needs_all)
            _inject_all(cluster, callers, outcome, injector, faults, seconds, say)
            outcome.wrong += injector.wrong
        finally:
            for caller in callers:
                caller.stop()
            limit = time.monotonic() + HUNG + 30
            for caller in callers:
                caller.join(max(0.1, limit - time.monotonic()))
        outcome.streams = [stream for caller in callers for stream in caller.streams]
        outcome.wrong += [
            f"the caller {caller.name} is still waiting" for caller in callers if caller.is_alive()
        ]
        _check_end(cluster, outcome)
        outcome.seconds = time.monotonic() - began
    # The machine may have become slower, since others may use it too.
    load, read = _measure_single(llama, model)
    outcome.load, outcome.read = max(outcome.load, load), max(outcome.read, read)
    return outcome


def _inject_all(
    cluster: Cluster,
    callers: list[Caller],
    outcome: Outcome,
    faults: Faults,
    count: int,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    end = time.monotonic() + seconds
    first = _wait_for_words(callers, time.monotonic(), set())
    if first == float("inf"):
        outcome.wrong.append(f"no answers within {SETTLE_SECONDS:.0f} s from the start")
        return
    outcome.memory = [(_memory(node), 0.0) for node in cluster]
    while len(outcome.results) < count and time.monotonic() < end:
        active = [stream for caller in callers if (stream := caller.current) is not None]
        before = {id(stream): len(stream.times) for stream in active}
        fault = faults.inject_next()
        result = FaultResult(fault, active)
        outcome.results.append(result)
        away = set(fault.hurt) if fault.undo else set()
        result.settled = _wait_for_words(callers, fault.time, away)
        if fault.undo:
            fault.undo()
        if fault.hurt:
            with contextlib.suppress(AssertionError):
                cluster.together(60)
            for name in fault.hurt:
                outcome.hurt.setdefault(name, []).append((fault.time, time.monotonic() + 1.0))
            if fault.undo:
                _wait_for_words(callers, time.monotonic(), set())
        result.waits = [
            wait
            for stream in active
            if stream.node.name not in fault.hurt and stream.dialect.streamed and before[id(stream)]
            if (wait := _wait_of(stream, fault.time)) is not None
        ]
        say(_line(len(outcome.results), result))
        if result.settled == float("inf"):
            outcome.wrong.append(
                f"fault {len(outcome.results)} ({fault.kind}): no answers within {SETTLE_SECONDS:.0f} s; "
                + "; ".join(_progress(caller) for caller in callers)
            )
            if sum(result.settled == float("inf") for result in outcome.results) >= 3:
                return


def _progress(caller: Caller) -> str:
    stream = caller.current
    words = len(stream.times) if stream else 0
    return f"{caller.name}: {words} words, before {caller.streams[-1].error if caller.streams else 'nothing'}"


def _wait_for_words(callers: list[Caller], since: float, away: set[str]) -> float:
    """Wait until each caller has a word newer than the fault; return the seconds since the fault."""
    relevant = [c for c in callers if c.node.name not in away and c.dialect.streamed]
    # A word that was already in transit does not count.
    fresh = max(time.monotonic(), since) + 0.5
    while any(caller.last_word() <= fresh for caller in relevant):
        if time.monotonic() - fresh > SETTLE_SECONDS:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - since


def _wait_of(stream: Stream, time_: float) -> float | None:
    """Seconds from the fault to the end of the longest pause after it; None if there was none."""
    times = list(stream.times)
    pauses = [(later - sooner, later) for sooner, later in itertools.pairwise(times) if later > time_]
    pause, end = max(pauses, default=(0.0, 0.0))
    return end - time_ if pause >= PAUSE else None


def _line(number: int, result: FaultResult) -> str:
    fault = result.fault
    waits = "no stream waited"
    if result.waits:
        waits = (
            f"next word after {statistics.median(result.waits):5.1f} s, worst {max(result.waits):5.1f} s, "
            f"{len(result.waits)} streams"
        )
    settled = (
        f"all continue after {result.settled:5.1f} s" if result.settled != float("inf") else "NO ANSWERS"
    )
    return f"{number:4} {fault.kind:26} {fault.target:12} {settled}; {waits}"


def _check_end(cluster: Cluster, outcome: Outcome) -> None:
    """Check that memory is released and engines end, after unloading and after stopping the daemons."""
    wrong = outcome.wrong
    with _recording_errors(wrong):
        cluster.together(60)
    outcome.memory = [
        (first, _memory(node)) for (first, _), node in zip(outcome.memory, cluster, strict=False)
    ]
    wrong.extend(
        f"{node.name} has grown from {first:.0f} MB to {last:.0f} MB"
        for (first, last), node in zip(outcome.memory, cluster, strict=False)
        if last - first > MAX_GROWTH
    )

    def unloaded() -> bool:
        # Failed deployments stay listed for a while.
        remaining = [item for item in cluster.deployments() if item["state"] != "failed"]
        for deployment in remaining:
            cluster[0].ask("POST", "/api/cluster/unload", {"model": deployment["id"], "force": True})
        return not remaining

    def granted() -> int:
        """Granted bytes as seen by all nodes; -1 while a node does not respond or does not see all."""
        states = [node.state().get("nodes", []) for node in cluster]
        if any(len(nodes) != len(cluster) for nodes in states):
            return -1
        return sum(device["granted"] for nodes in states for node in nodes for device in node["devices"])

    with _recording_errors(wrong):
        until(unloaded, "every deployment is unloaded", 60, 0.5)
    with _recording_errors(wrong):
        until(lambda: granted() == 0, "all memory is released", 30, 0.5)
    with _recording_errors(wrong):
        until(lambda: not any(engines(node) for node in cluster), "every engine has ended", 30, 0.5)
    for node in cluster:
        with _recording_errors(wrong):
            if (code := node.stop(STOP_SECONDS)) != 0:
                wrong.append(f"{node.name} ended with {code}")
    wrong.extend(f"engines of {node.name} are still running" for node in cluster if engines(node))
    for node in cluster:
        wrong.extend(
            f"{node.name} logged: {line}"
            for line in node.log().splitlines()
            if any(words in line for words in OWN_FAULTS)
        )


@contextlib.contextmanager
def _recording_errors(wrong: list[str]) -> Iterator[None]:
    try:
        yield
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        wrong.append(f"at the end: {error}")


def _memory(node: Node) -> float:
    """The resident memory of the daemon, in MB."""
    assert node.process is not None
    text = Path(f"/proc/{node.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def _measure_single(llama: Llama, model: Path) -> tuple[float, float]:
    """Seconds that a single llama-server needs to load the model, and to process resumed prompts."""
    slots, context, ubatch = str(STREAMS), str(768 * STREAMS), str(SETTINGS["placement.ubatch"])
    began = time.monotonic()
    with single_server(llama, model, "-c", context, "-np", slots, "-t", "1", "-ub", ubatch) as url:
        loaded = time.monotonic()
        body = json.dumps({"prompt": "".join(RECITAL.pieces[:WORDS_BEFORE]), "n_predict": 1}).encode()

        def ask(_: int) -> None:
            with urllib.request.urlopen(f"{url}/completion", body, 120) as answer:
                answer.read()

        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(ask, range(STREAMS)))
        return loaded - began, time.monotonic() - loaded
