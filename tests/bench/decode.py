"""Decode speed of a sharded model through a node, compared with the same engines started manually.

All nodes share this machine. In reality each has its own, with an idle CPU while another computes its
layers. So the engines of both sides get half of the cores, and the daemons and callers the other half. Both
sides are loaded several times in alternating order, since two loads of the same engines differ by some per
cent for their whole lifetime, depending on their memory layout.

Also compares the speed predicted by the plan after one answer with the measured one. Exits with 1 if the
prediction is off by more than a quarter.

    python -m tests.bench.decode [--loads 6] [--pairs 4] [--tokens 64] [--bytes 0.8e9]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import netns
from tests.bench.by_hand import PORT, Engines, bind, by_hand, engines, processes
from tests.daemons import Cluster, Node, until
from tests.found_llama import required_llama
from tests.gguf import writer
from tests.gguf.size import Size

MODEL = "bench"
WANTED = 0.97
ERROR = 0.25
STEADY = 8
"""Number of consecutive predictions, half a second apart, that must be equal."""
PROMPT = {"role": "user", "content": "Tell me a story about a lighthouse."}


class Halves:
    """The machine's cores: one half for engines, one for everything else. A single core is shared."""

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.engines = set(cores[: max(1, len(cores) // 2)])
        self.others = set(cores[len(self.engines) :]) or self.engines


def speed(node: Node, port: int, tokens: int) -> float:
    """Return the tokens per second between the first and the last event of a stream."""
    body: dict[str, Any] = {"model": MODEL, "messages": [PROMPT], "stream": True, "max_tokens": tokens}
    body |= {"temperature": 0, "seed": 1, "ignore_eos": True, "cache_prompt": False}
    with node.network():
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        link.connect()
    with contextlib.closing(link):
        headers = {"Content-Type": "application/json"}
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        events = (line for line in link.getresponse() if line.startswith(b"data: {"))
        times = [time.perf_counter() for event in events if b'"content":' in event]
    return (len(times) - 1) / (times[-1] - times[0])


def predicted(node: Node) -> float:
    """Return the tokens per second that a new plan predicts."""
    reply = node.ask("POST", "/api/cluster/plan", {"model": MODEL})
    assert reply.status == 200, reply.body
    return float(reply.json["plan"]["tokens_per_second"])


def learned(cluster: Cluster, node: Node) -> float:
    """Return the prediction after an answer, which every node evaluates within some seconds."""
    until(lambda: cluster.deployments()[0]["speed"] > 0, "the speed is measured")
    seen: list[float] = []

    def steady() -> bool:
        seen.append(predicted(node))
        return len(seen) > STEADY and len(set(seen[-STEADY:])) == 1

    until(steady, "the prediction is steady", step=0.5)
    return seen[-1]


def load(cluster: Cluster, halves: Halves) -> Engines:
    """Load the model and return its engines."""
    loaded = cluster[0].ask("POST", "/api/cluster/load", {"model": MODEL}, timeout=300)
    assert loaded.status == 200, loaded.body
    for node in cluster:
        for process in processes(node):
            bind(process.pid, halves.engines)
    return engines(cluster)


def start(stack: contextlib.ExitStack, ours: Engines, halves: Halves) -> None:
    """Start the same engines manually until ``stack`` is closed."""
    for process in stack.enter_context(by_hand(ours)):
        bind(process, halves.engines)


def unload(cluster: Cluster) -> None:
    """Unload the model and wait until all memory is released."""
    body = {"model": MODEL, "force": True}
    ended = cluster[0].ask("POST", "/api/cluster/unload", body, timeout=60)
    assert ended.status == 200, ended.body
    until(lambda: not cluster.deployments() and not any(map(processes, cluster)), "it is unloaded")


def pairs(queried: Node, head: Node, count: int, tokens: int) -> list[tuple[float, float]]:
    """Return speeds through a node and of the manual engines, each measured first half of the times."""
    sides = {queried: queried.http, head: PORT}
    for node, port in sides.items():
        speed(node, port, max(tokens, 24))
    found = []
    for turn in range(count):
        speeds = {
            node: speed(node, sides[node], tokens) for node in (reversed(sides) if turn % 2 else iter(sides))
        }
        found.append((speeds[queried], speeds[head]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", type=int, default=6, help="loads of each side")
    parser.add_argument("--pairs", type=int, default=4, help="measurements after each load")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bytes", type=float, default=0.8e9)
    options = parser.parse_args()
    if reason := netns.available():
        print(f"skipped: {reason}")
        return
    llama = required_llama()
    halves = Halves()
    os.sched_setaffinity(0, halves.others)  # inherited by the daemons
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = writer.sized(
            "llama", options.bytes, Size(layers=16, embd=1024, heads=16, heads_kv=4, vocab=4096)
        )
        settings = {"placement.context": 1024, "placement.slots": 1, "placement.keep_alive": -1}
        settings["llama.threads"] = len(halves.engines)
        memory = f"{int(options.bytes / 2e6)} MB"
        with Cluster(3, Path(folder), llama, memory=memory, settings=settings) as cluster:
            writer.write(cluster[0].models / f"{MODEL}.gguf", "llama", size)
            cluster.together()
            until(lambda: MODEL in cluster[0].ask("GET", "/api/tags").body.decode(), "the model is listed")
            ours = load(cluster, halves)
            caller = next(node for node in cluster if node is not ours.head)
            blind = predicted(caller)
            speed(caller, caller.http, max(options.tokens, 24))
            latest = learned(cluster, caller)
            seconds = 0
            for turn in range(options.loads):
                unload(cluster)
                with contextlib.ExitStack() as stack:
                    second = 2 * seconds <= turn
                    if second:
                        start(stack, ours, halves)
                    now = load(cluster, halves)
                    if second and now != ours:
                        stack.close()  # the leader chose another placement this time
                        second = False
                    if not second:
                        start(stack, now, halves)
                    ours = now
                    row = pairs(caller, ours.head, options.pairs, options.tokens)
                found += row
                seconds += second
                words = ", ".join(f"{through:.1f}/{direct:.1f}" for through, direct in row)
                print(f"layers {ours.layers}, loaded {'second' if second else 'first'}: {words}", flush=True)
    report(found, blind, latest)


def report(found: list[tuple[float, float]], blind: float, latest: float) -> None:
    """Print the table and exit with 1 if a goal is missed."""
    through, direct = (statistics.median(side) for side in zip(*found, strict=True))
    ratio = statistics.median(a / b for a, b in found)
    print(f"{'through a node':>18} {'manual':>10} {'ratio':>6}")
    print(f"{through:>14.2f} t/s {direct:>6.2f} t/s {ratio:>6.3f}   (goal: at least {WANTED})")
    print(
        f"predicted before any answer {blind:.2f} t/s, after one {latest:.2f} t/s; measured {through:.2f} t/s"
    )
    error = latest / through - 1
    print(f"the prediction is off by {error:+.0%}   (goal: at most 25 %)")
    if abs(error) > ERROR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
