"""``python -m tests.soak --hours 2``: a cluster of three under load for hours, which must not grow.

The load pauses after ten minutes (or a third of a shorter time), then every ten minutes and at the end, so
that resources can be compared: memory, descriptors, threads, asyncio tasks, files and logs of each daemon.
All samples are plotted and written to ``soak.csv``. The exit status is 1 if a quantity at the end is more
than 5 % above its value at the first pause, or if an answer was wrong.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import TextIO

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.chaos.round import MEMORY, RECITAL, SETTINGS
from tests.daemons import Cluster
from tests.found_llama import found_llama
from tests.soak.samples import NAMES, Sample, grown, median_sample, sparkline, take
from tests.soak.work import MODEL, SMALL, Work

FIRST, PERIOD = 600.0, 600.0
"""Seconds before the first pause and between two pauses."""
LOOK = 5.0
CALM, LOOKS = 95.0, 5
"""Seconds until idle keep-alive connections are closed, and the number of samples taken then."""


class Soak:
    """One run of the soak test."""

    def __init__(self, cluster: Cluster, seed: int, table: TextIO) -> None:
        self.work = Work(cluster, cluster[3], seed)
        self.rests: dict[str, list[Sample]] = {node.name: [] for node in self.work.residents}
        self._seen: dict[str, list[Sample]] = {node.name: [] for node in self.work.residents}
        self._table = csv.writer(table)
        self._table.writerow(["seconds", "node", "rest", *NAMES])
        self._began = time.monotonic()

    def run(self, seconds: float) -> None:
        """Alternate load and pauses for ``seconds``."""
        end = self._began + seconds
        turn = min(FIRST, seconds / 3)
        period = min(PERIOD, seconds / 3)
        while True:
            self._apply_load(min(turn, max(end - time.monotonic(), turn / 2)))
            self._rest()
            if time.monotonic() >= end:
                return
            turn = period

    def _apply_load(self, seconds: float) -> None:
        end, look = time.monotonic() + seconds, 0.0
        self.work.begin()
        while time.monotonic() < end:
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK
                for node in self.work.residents:
                    self._record(node.name, take(node), rest=False)
            self.work.step()

    def _rest(self) -> None:
        self.work.rest()
        time.sleep(CALM)
        looks: dict[str, list[Sample]] = {name: [] for name in self.rests}
        for _ in range(LOOKS):
            for node in self.work.residents:
                looks[node.name].append(take(node))
                self._record(node.name, looks[node.name][-1], rest=True)
            time.sleep(1.0)
        for name, samples in looks.items():
            self.rests[name].append(median_sample(samples))
            found = zip(NAMES, astuple(self.rests[name][-1]), strict=True)
            print(
                f"{self._elapsed():>6.0f} s {name}: " + ", ".join(f"{n} {v:.1f}" for n, v in found),
                flush=True,
            )

    def _record(self, name: str, sample: Sample, *, rest: bool) -> None:
        self._seen[name].append(sample)
        self._table.writerow(
            [f"{self._elapsed():.0f}", name, int(rest), *(f"{v:.2f}" for v in astuple(sample))]
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def report(self) -> list[str]:
        """Plot all samples and return descriptions of the failures."""
        print(", ".join(f"{count} {activity}" for activity, count in sorted(self.work.done.items())))
        for name, samples in self._seen.items():
            for quantity in NAMES:
                print(f"{name} {quantity:>12} {sparkline([getattr(sample, quantity) for sample in samples])}")
        wrong = list(self.work.wrong)
        for name, rests in self.rests.items():
            wrong += grown(name, rests[0], rests[-1])
        return wrong


def main() -> int:
    """Run the soak test from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    llama, why = found_llama()
    if llama is None:
        print(why)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {arguments.seed}; numbers and logs in {folder}", flush=True)
    wrong = _soak(llama, folder, arguments.hours * 3600, arguments.seed)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(wrong))


def _soak(llama: Llama, folder: Path, seconds: float, seed: int) -> list[str]:
    write(folder / f"{MODEL}.gguf", RECITAL)
    write(folder / f"{SMALL}.gguf", Recital(counting(40), name=SMALL, layers=1, width=64, hidden=64))
    settings = SETTINGS | {"llama.worker_cache_limit": "200 MB"}
    with Cluster(4, folder, llama, memory=MEMORY, settings=settings, start=False) as cluster:
        for node in cluster:
            (node.models / f"{SMALL}.gguf").symlink_to(folder / f"{SMALL}.gguf")
        for node in cluster.nodes[:2]:
            (node.models / f"{MODEL}.gguf").symlink_to(folder / f"{MODEL}.gguf")
        for node in cluster.nodes[:3]:
            node.start()
        cluster.together(120)
        with (folder / "soak.csv").open("w") as table:
            soak = Soak(cluster, seed, table)
            soak.run(seconds)
            return soak.report()


if __name__ == "__main__":
    sys.exit(main())
