"""Replays schedules: ``python -m tests.sim --seed 7`` with a trace, ``--count 1000`` many without."""

from __future__ import annotations

import argparse
import sys
import time

from .schedule import run


def main() -> int:
    """The command; 1 when an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed_", metavar="SEED", nargs="?", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None, help="the schedule to replay, or the first of many")
    parser.add_argument("--count", type=int, default=1, help="how many schedules; more than one: no trace")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else options.seed_
    first = 0 if seed is None else seed
    if options.count == 1:
        outcome = run(first, trace=print)
        print(outcome)
        return 1 if outcome.fault else 0
    began = time.monotonic()
    broken = 0
    healed = []
    for number in range(first, first + options.count):
        outcome = run(number)
        if outcome.fault:
            broken += 1
            print(f"seed {number}: {outcome.fault}")
        else:
            healed.append(outcome.healed)
    healed.sort()
    if healed:
        median, most = healed[len(healed) // 2], healed[-1]
        print(f"agreement after healing: median {median:.1f} s, at most {most:.1f} s")
    print(f"{options.count} schedules in {time.monotonic() - began:.1f} s, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
