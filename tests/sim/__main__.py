"""Run random schedules: many, or with ``--seed 7`` one with a trace of its events."""

from __future__ import annotations

import argparse
import sys
import time

from .schedule import run


def main() -> int:
    """Run the command. Returns 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this schedule; with --count: the first one")
    parser.add_argument("--count", type=int, help="number of schedules (500), without a trace")
    options = parser.parse_args()
    if options.seed is not None and options.count is None:
        outcome = run(options.seed, trace=print)
        print(outcome)
        return 1 if outcome.fault else 0
    first, count = options.seed or 0, options.count or 500
    began = time.monotonic()
    failures = 0
    healed = []
    for number in range(first, first + count):
        outcome = run(number)
        if outcome.fault:
            failures += 1
            print(f"seed {number}: {outcome.fault}")
        else:
            healed.append(outcome.healed)
    healed.sort()
    if healed:
        median, most = healed[len(healed) // 2], healed[-1]
        print(f"agreement after healing: median {median:.1f} s, at most {most:.1f} s")
    print(f"{count} schedules in {time.monotonic() - began:.1f} s, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
