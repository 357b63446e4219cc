"""CPU time of planning with the default settings: `python -m tests.bench.planner` prints a table.

Exits with 1 if a median misses its goal.
"""

from __future__ import annotations

import random
import sys
import time

from sollold.placement.inventory import Fleet, Link
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest
from tests.placement.fleets import GIB, MIB, cpu, footprint_with, gpu, machine, random_fleet, shape


def main() -> None:
    print(f"{'machines':>8} {'devices':>8} {'layers':>7} {'median ms':>10} {'worst ms':>9} {'goal ms':>8}")
    met = [
        row("random", 5, 80, 5.0),
        row("gpus", 8, 80, 5.0),
        row("uneven", 5, 80, 5.0),
        row("big", 512, 128, 50.0),
        row("big, all have the file", 512, 128, 50.0),
    ]
    if not all(met):
        sys.exit("a goal is missed")


def row(kind: str, machines: int, layers: int, goal: float) -> bool:
    """Measure one kind of cluster and return whether the median meets the goal."""
    times = []
    devices: list[int] = []
    for seed in range(30):
        dice = random.Random(seed)
        sizes = [int(500 * MIB * dice.choice([0.9, 1.0, 1.15])) for _ in range(layers)]
        if kind != "uneven":
            sizes = [500 * MIB] * layers
        model = shape(layers, 500 * MIB, 1 * GIB, sizes=sizes, n_embd=8192, n_vocab=128000)
        fleet = fleet_of(kind, seed, machines, sum(sizes))
        devices.append(sum(len(node.devices) for node in fleet.machines))
        prints_of = footprint_with(model)
        begun = time.process_time()
        choose(PlacementRequest("model", "digest"), fleet, prints_of)
        times.append((time.process_time() - begun) * 1000)
    times.sort()
    print(
        f"{machines:>8} {sum(devices) / len(devices):>8.1f} {layers:>7} {times[len(times) // 2]:>10.2f} "
        f"{times[-1]:>9.2f} {goal:>8.0f}  {kind}"
    )
    return times[len(times) // 2] <= goal


def fleet_of(kind: str, seed: int, machines: int, needed: int) -> Fleet:
    dice = random.Random(seed)
    if kind in ("random", "uneven"):
        # About eight devices, since half of the machines have two.
        return random_fleet(seed, needed, machines)
    if kind == "gpus":
        return Fleet(
            tuple(
                machine(
                    gpu(f"n{i}", int(needed / 5), dice.choice([400e9, 900e9])),
                    holds=i == 0,
                )
                for i in range(machines)
            )
        )
    share = needed / 9
    return Fleet(
        tuple(
            machine(
                cpu(f"n{i}", int(share * dice.uniform(0.3, 1.5)), dice.uniform(10e9, 900e9)),
                holds=i == 0 or "all" in kind,
                links=(("n0", Link(dice.uniform(0.0001, 0.002), dice.uniform(1e8, 1e9))),) if i else (),
            )
            for i in range(machines)
        )
    )


if __name__ == "__main__":
    main()
