"""``python -m tests.soak --hours 2``: a cluster of three at work for hours, which must not grow.

After the first ten minutes (a third of the time, when that is less), then every ten minutes and at the end
the work rests, so that what is held can be compared: memory, descriptors, threads, tasks of the loop, files
and logs of each daemon. All is drawn, and noted in ``soak.csv``. Exit status 1 when something at the end is
more than 5 % above what it was at the first rest, or an answer was wrong.
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
from tests.soak.samples import NAMES, Sample, drawn, grown, middle, take
from tests.soak.work import MODEL, SMALL, Work

FIRST, PERIOD = 600.0, 600.0
"""Seconds until the first rest, and between two rests."""
LOOK = 5.0
CALM, LOOKS = 95.0, 5
"""Seconds until connections that are kept for the next call are closed, and samples that are then taken."""


class Soak:
    """One run."""

    def __init__(self, cluster: Cluster, seed: int, table: TextIO) -> None:
        self.work = Work(cluster, cluster[3], seed)
        self.rests: dict[str, list[Sample]] = {node.name: [] for node in self.work.residents}
        self._seen: dict[str, list[Sample]] = {node.name: [] for node in self.work.residents}
        self._table = csv.writer(table)
        self._table.writerow(["seconds", "node", "rest", *NAMES])
        self._began = time.monotonic()

    def run(self, seconds: float) -> None:
        """Work and rest by turns for so long."""
        end = self._began + seconds
        turn = min(FIRST, seconds / 3)
        period = min(PERIOD, seconds / 3)
        while True:
            self._busy(min(turn, max(end - time.monotonic(), turn / 2)))
            self._rest()
            if time.monotonic() >= end:
                return
            turn = period

    def _busy(self, seconds: float) -> None:
        end, look = time.monotonic() + seconds, 0.0
        self.work.begin()
        while time.monotonic() < end:
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK
                for node in self.work.residents:
                    self._note(node.name, take(node), rest=False)
            self.work.step()

    def _rest(self) -> None:
        self.work.rest()
        time.sleep(CALM)
        looks: dict[str, list[Sample]] = {name: [] for name in self.rests}
        for _ in range(LOOKS):
            for node in self.work.residents:
                looks[node.name].append(take(node))
                self._note(node.name, looks[node.name][-1], rest=True)
            time.sleep(1.0)
        for name, samples in looks.items():
            self.rests[name].append(middle(samples))
            found = zip(NAMES, astuple(self.rests[name][-1]), strict=True)
            print(f"{self._at():>6.0f} s {name}: " + ", ".join(f"{n} {v:.1f}" for n, v in found), flush=True)

    def _note(self, name: str, sample: Sample, *, rest: bool) -> None:
        self._seen[name].append(sample)
        self._table.writerow([f"{self._at():.0f}", name, int(rest), *(f"{v:.2f}" for v in astuple(sample))])

    def _at(self) -> float:
        return time.monotonic() - self._began

    def report(self) -> list[str]:
        """Draw it all; what must not be, in sentences."""
        print(", ".join(f"{count} {what}" for what, count in sorted(self.work.done.items())))
        for name, samples in self._seen.items():
            for what in NAMES:
                print(f"{name} {what:>12} {drawn([getattr(sample, what) for sample in samples])}")
        wrong = list(self.work.wrong)
        for name, rests in self.rests.items():
            wrong += grown(name, rests[0], rests[-1])
        return wrong


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    llama, why = found_llama()
    if llama is None:
        print(why)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {given.seed}; numbers and logs in {folder}", flush=True)
    wrong = _soak(llama, folder, given.hours * 3600, given.seed)
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
