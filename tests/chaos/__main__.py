"""``python -m tests.chaos --faults 200 --seed 1``: faults on a real cluster; exit status 1 on any wrong."""

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
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="strike no longer than that")
    parser.add_argument("--short", action="store_true", help="only the faults that the tests use")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    llama, why = found_llama()
    if llama is None:
        print(why)
        return 1
    rounds = [(given.faults, False), (max(4, given.faults // 10), True)]
    ends = [_round(llama, given, faults, needs_all=needs_all) for faults, needs_all in rounds]
    return max(ends)


def _round(llama: Llama, given: argparse.Namespace, faults: int, *, needs_all: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))

    def say(line: str) -> None:
        print(line, flush=True)

    say(
        f"seed {given.seed}, the model needs {'all' if needs_all else 'two'} of three nodes, logs in {folder}"
    )
    outcome = run(
        llama,
        folder,
        faults=faults,
        seed=given.seed,
        short=given.short,
        needs_all=needs_all,
        seconds=given.seconds,
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
