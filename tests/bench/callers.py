"""Tokens per second of a sharded model for 1, 2, 4 and 8 concurrent callers, with and without sollold.

The same engines are also started manually with the same slots. Cores are shared as in `tests.bench.decode`.
The two sides are measured in turn, and medians are shown.

    python -m tests.bench.callers [--pairs 3] [--tokens 48] [--bytes 0.4e9]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from tests import netns
from tests.bench.by_hand import PORT
from tests.bench.decode import MODEL, Halves, load, speed, start
from tests.daemons import Cluster, Node, until
from tests.found_llama import required_llama
from tests.gguf import writer
from tests.gguf.size import Size

CALLERS = (1, 2, 4, 8)
SLOTS = max(CALLERS)


def together(node: Node, port: int, callers: int, tokens: int) -> float:
    """Return the tokens per second of concurrent streams, including prompt processing."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            speed(node, port, tokens)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return callers * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="measurements for each number of callers")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--bytes", type=float, default=0.4e9)
    options = parser.parse_args()
    if reason := netns.available():
        print(f"skipped: {reason}")
        return
    llama = required_llama()
    halves = Halves()
    os.sched_setaffinity(0, halves.others)  # inherited by the daemons
    size = writer.sized("llama", options.bytes, Size(layers=16, embd=1024, heads=16, heads_kv=4, vocab=4096))
    settings = {"placement.context": 512, "placement.slots": SLOTS, "placement.keep_alive": -1}
    settings["llama.threads"] = len(halves.engines)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        memory = f"{int(options.bytes / 1.8e6)} MB"
        cluster = stack.enter_context(Cluster(3, Path(folder), llama, memory=memory, settings=settings))
        writer.write(cluster[0].models / f"{MODEL}.gguf", "llama", size)
        cluster.together()
        until(lambda: MODEL in cluster[0].ask("GET", "/api/tags").body.decode(), "the model is listed")
        ours = load(cluster, halves)
        start(stack, ours, halves)
        asked = next(node for node in cluster if node is not ours.head)
        print(f"layers {ours.layers}, {SLOTS} slots")
        print(f"{'callers':>8} {'through a node':>16} {'manual':>12} {'ratio':>6}")
        for callers in CALLERS:
            found = measure(asked, ours.head, callers, options.pairs, options.tokens)
            through, direct = (statistics.median(side) for side in zip(*found, strict=True))
            ratio = statistics.median(a / b for a, b in found)
            print(f"{callers:>8} {through:>12.2f} t/s {direct:>8.2f} t/s {ratio:>6.3f}", flush=True)


def measure(asked: Node, head: Node, callers: int, pairs: int, tokens: int) -> list[tuple[float, float]]:
    """Return speeds through a node and of the manual engines, each measured first half of the times."""
    sides = {asked: asked.http, head: PORT}
    found = []
    for turn in range(pairs + 1):
        order = reversed(sides) if turn % 2 else iter(sides)
        speeds = {node: together(node, sides[node], callers, tokens) for node in order}
        found.append((speeds[asked], speeds[head]))
    # The first request fills caches.
    return found[1:]


if __name__ == "__main__":
    main()
