"""First load of a sharded model over links of 1 Gbit/s, compared with the same engines started manually.

Measured with the model's file on every machine, and with the file on two machines that are not the workers.
The workers' caches are empty before each load, and files are in memory on both sides. Each machine sends at
most 1 Gbit/s (its interface's queue is limited), so data from two machines arrives faster than that. The time
is from the command until the model answers; for the manual engines, from the start of the first process.

All machines share the cores of this one, and the head reads and hashes every byte on both sides. On separate
machines both sides would be faster by the same number of seconds. On a busy machine the times mean little,
but the bytes sent by the head do. Exits with 1 if a goal is missed.

    python -m tests.bench.load [--pairs 3] [--bytes 0.8e9] [--rate 1gbit]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sollold.engines.install.find import Llama
from tests import netns
from tests.bench.by_hand import Engines, by_hand, engines, processes
from tests.daemons import Cluster, Node, until
from tests.found_llama import required_llama
from tests.gguf import writer
from tests.gguf.size import Size

MODEL = "bench"
GOALS = {"copies": 0.35, "two sources": 0.6}


def first_load(cluster: Cluster) -> tuple[float, Engines]:
    """Return the seconds of a first load by the cluster, and its engines."""
    for node in cluster:
        shutil.rmtree(node.folder / "cache" / "tensors" / "whole", ignore_errors=True)
    begin = time.perf_counter()
    loaded = cluster[0].ask("POST", "/api/cluster/load", {"model": MODEL}, timeout=300)
    taken = time.perf_counter() - begin
    assert loaded.status == 200, loaded.body
    found = engines(cluster)
    body = {"model": MODEL, "force": True}
    ended = cluster[0].ask("POST", "/api/cluster/unload", body, timeout=60)
    assert ended.status == 200, ended.body
    until(lambda: not cluster.deployments() and not any(map(processes, cluster)), "it is unloaded")
    return taken, found


def manual_load(same: Engines) -> float:
    """Return the seconds of the same load with manual engines."""
    begin = time.perf_counter()
    with by_hand(same):
        return time.perf_counter() - begin


def sent_bytes(node: Node) -> int:
    """Return the bytes that a machine has sent over its network interface."""
    assert node.machine is not None
    link_statistics = node.machine.run(["ip", "-s", "-j", "link", "show", "eth0"]).stdout
    return int(json.loads(link_statistics)[0]["stats64"]["tx"]["bytes"])


def limit_rate(cluster: Cluster, rate: str) -> None:
    """Limit the send rate of every machine."""
    assert cluster.lan is not None
    for machine in cluster.lan:
        limit = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
        machine.run([*limit, "burst", "1m", "latency", "50ms"])


def measure(name: str, holders: tuple[int, ...], options: argparse.Namespace, llama: Llama) -> bool:
    """Print one row and return whether its goal is met."""
    size = writer.sized("llama", options.bytes, Size(layers=8, embd=1024, heads=16, heads_kv=4, vocab=4096))
    settings: dict[str, Any] = {"placement.context": 512, "placement.slots": 1, "placement.keep_alive": -1}
    share = f"{int(options.bytes / 1.9e6)} MB"
    # The machine that is only a source has no memory for layers.
    each = [
        {"node.memory_limit": share if index < 3 else "20 MB"}
        for index in range(4 if max(holders) > 2 else 3)
    ]
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 8 * options.bytes
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=memory if roomy else None))
        cluster = stack.enter_context(Cluster(len(each), Path(folder), llama, settings=settings, each=each))
        made = Path(folder) / "made.gguf"
        writer.write(made, "llama", size)
        for index in holders:
            shutil.copy(made, cluster[index].models / f"{MODEL}.gguf")
        cluster.together()
        known = [cluster[index] for index in holders]
        until(lambda: all(MODEL in n.ask("GET", "/api/tags").body.decode() for n in known), "it is listed")
        time.sleep(8)  # The nodes' initial measurements are complete and exchanged.
        limit_rate(cluster, options.rate)
        # Not counted: a virtual machine gets much of its memory from its host only when it is first used.
        manual_load(first_load(cluster)[1])
        rows = []
        for _ in range(options.pairs):
            before = {node.name: sent_bytes(node) for node in cluster}
            taken, same = first_load(cluster)
            cable = sent_bytes(same.head) - before[same.head.name]
            manual = manual_load(same)
            by_cable = sent_bytes(same.head) - before[same.head.name] - cable
            rows.append((taken, manual))
            print(
                f"  {taken:.2f} s / {manual:.2f} s manually, layers {same.layers}; "
                f"the head sent {cable / 1e6:.0f} / {by_cable / 1e6:.0f} MB",
                flush=True,
            )
        if options.logs:
            for node in cluster:
                print(
                    "\n".join(
                        line for line in node.log().splitlines() if " the head" in line or "cache" in line
                    )
                )
    ratio = statistics.median(a / b for a, b in rows)
    taken, manual = (statistics.median(side) for side in zip(*rows, strict=True))
    met = ratio <= GOALS[name]
    print(
        f"{name:<12} {taken:>8.2f} s {manual:>8.2f} s {ratio:>6.2f}   (goal: at most {GOALS[name]})",
        flush=True,
    )
    return met


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--bytes", type=float, default=0.8e9)
    parser.add_argument("--rate", default="1gbit", help="send rate of each machine in the notation of tc")
    parser.add_argument("--only", choices=tuple(GOALS))
    parser.add_argument("--logs", action="store_true", help="print the log lines about caches")
    options = parser.parse_args()
    if reason := netns.available() or ("" if shutil.which("tc") else "tc is not here"):
        print(f"skipped: {reason}")
        return
    llama = required_llama()
    print(f"{'':<12} {'cluster':>10} {'manual':>10} {'ratio':>6}")
    holders = {"copies": (0, 1, 2), "two sources": (0, 3)}

    def run(name: str) -> bool:
        return measure(name, holders[name], options, llama)

    wanted = [options.only] if options.only else list(GOALS)
    if not all(list(map(run, wanted))):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
