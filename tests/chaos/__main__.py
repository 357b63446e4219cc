"""Inject faults into a real cluster: ``python -m tests.chaos --faults 200 --seed 1``.

The exit status is 1 if there are violations.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from sollold.engines.install.find import Llama
from tests.chaos.report import forbidden, report
from tests.chaos.round import run
from tests.found_llama import found_llama


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="maximum duration of the faults")
    parser.add_argument("--short", action="store_true", help="only the faults that the tests use")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    llama, reason = found_llama()
    if llama is None:
        print(reason)
        return 1
    rounds = [(options.faults, False), (max(4, options.faults // 10), True)]
    statuses = [_round(llama, options, faults, needs_all=needs_all) for faults, needs_all in rounds]
    return max(statuses)


def _round(llama: Llama, options: argparse.Namespace, faults: int, *, needs_all: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"seed {options.seed}, the model needs {'all' if needs_all else 'two'} of 3 nodes, logs in {folder}")
    outcome = run(
        llama,
        folder,
        faults=faults,
        seed=options.seed,
        short=options.short,
        needs_all=needs_all,
        seconds=options.seconds,
        say=say,
    )
    for line in report(outcome):
        say(line)
    if forbidden(outcome):
        say(f"the daemons' logs are kept in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
