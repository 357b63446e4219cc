"""CPU time and memory of an idle daemon in a cluster of three.

python -m tests.bench.idle [--seconds 30]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from tests.daemons import Cluster
from tests.found_llama import required_llama


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    llama = required_llama()
    with tempfile.TemporaryDirectory() as folder, Cluster(3, Path(folder), llama) as cluster:
        cluster.together()
        # By then the initial measurements (CPU speed, links) are complete and their memory is released.
        time.sleep(60)
        daemons = [psutil.Process(node.process.pid) for node in cluster if node.process]
        before = [sum(daemon.cpu_times()[:2]) for daemon in daemons]
        time.sleep(options.seconds)
        print(f"{'node':>6} {'of a core':>10} {'resident':>9} {'its own':>9}   (goal: 0.3 %, 50 MB)")
        for node, daemon, then in zip(cluster, daemons, before, strict=True):
            share = (sum(daemon.cpu_times()[:2]) - then) / options.seconds
            memory = daemon.memory_full_info()
            print(f"{node.name:>6} {share:>10.2%} {memory.rss / 1e6:>6.1f} MB {memory.uss / 1e6:>6.1f} MB")


if __name__ == "__main__":
    main()
