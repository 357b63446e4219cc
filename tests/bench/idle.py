"""What an idle daemon in a cluster of three costs: processor time and memory.

python -m tests.bench.idle [--seconds 30]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from sollold.agent.llama_find import find
from sollold.config import LlamaSettings, NodeSettings
from sollold.places import places
from tests.daemons import Cluster


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    llama, _ = find(LlamaSettings(), places(NodeSettings()).cache)
    if llama is None:
        raise SystemExit("no llama.cpp: run `sollold setup`")
    with tempfile.TemporaryDirectory() as folder, Cluster(3, Path(folder), llama) as cluster:
        cluster.together()
        # What is measured once at the start (the processor's speed, the links) is over by then.
        time.sleep(10)
        daemons = [psutil.Process(node.process.pid) for node in cluster if node.process]
        before = [sum(daemon.cpu_times()[:2]) for daemon in daemons]
        time.sleep(options.seconds)
        print(f"{'node':>6} {'of a core':>10} {'resident':>9}   (under 1 % and 80 MB wanted)")
        for node, daemon, then in zip(cluster, daemons, before, strict=True):
            share = (sum(daemon.cpu_times()[:2]) - then) / options.seconds
            print(f"{node.name:>6} {share:>10.2%} {daemon.memory_info().rss / 1e6:>6.1f} MB")


if __name__ == "__main__":
    main()
