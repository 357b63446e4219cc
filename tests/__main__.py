"""Run all tests in two parallel lanes: ``python -m tests [pytest arguments]``.

The first lane runs the tests with real daemons and engines, which are idle most of the time. The second lane
uses the remaining CPU time: first the tests without real daemons, then those that boot machines, build images
or open web pages in a browser, and last those marked ``patient``. The first and the last group run at a lower
priority, so that they don't delay tests with timeouts.

A test may fail because the machine was busy. If only a few files have failures, those files run again, alone.
A test that then passes is listed: it probably waits for a time instead of a condition.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DAEMONS = "cluster or llama or clients"
MACHINES = "systemd or browser"
PATIENT = "patient"
NICE = ("nice", "-n", "5")
SOME_FAILED, NO_TESTS, INTERRUPTED = 1, 5, 2
"""Exit codes of pytest: tests failed, no tests were collected, interrupted."""
MAX_RERUN_FILES = 4
"""With failures in more files than this, a busy machine is not the cause, and nothing is run again."""
POLL_SECONDS = 0.2
"""Interval between checks of the running processes."""


class Lane:
    """A sequence of pytest runs, one after the other.

    Args:
        runs: name, mark expression and command prefix of each run.
        command: the pytest command with its common arguments.
        folder: parent folder of the runs' pytest caches, which record the failures.
        output: file descriptor for the output of all runs; None: the terminal.
    """

    def __init__(
        self,
        runs: Sequence[tuple[str, str, Sequence[str]]],
        command: Sequence[str],
        folder: Path,
        output: int | None = None,
    ) -> None:
        self._left = list(runs)
        self._command = command
        self._folder = folder
        self._output = output
        self._running: subprocess.Popen[bytes] | None = None
        self.codes: list[int] = []

    def advance(self) -> bool:
        """Start the next run if the current one has ended. Returns whether a run is active."""
        if self._running is not None:
            code = self._running.poll()
            if code is None:
                return True
            self.codes.append(code)
            self._running = None
        if not self._left or INTERRUPTED in self.codes:
            return False
        name, marks, before = self._left.pop(0)
        command = [*before, *self._command, "-o", f"cache_dir={self._folder / name}", "-m", marks]
        stdin = None if self._output is None else subprocess.DEVNULL
        self._running = subprocess.Popen(command, stdin=stdin, stdout=self._output, stderr=self._output)
        return True

    def end(self) -> None:
        """Send SIGTERM to the current run, which then cleans up, and start no further runs."""
        self._left.clear()
        if self._running is not None:
            self._running.terminate()


def finish(lanes: Sequence[Lane]) -> list[int]:
    """Wait for all lanes and return the exit codes of their runs.

    A KeyboardInterrupt is ignored: the terminal also interrupts the runs, which then clean up and end.
    """
    while True:
        try:
            active = [lane.advance() for lane in lanes]
            if not any(active):
                return [code for lane in lanes for code in lane.codes]
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            continue


def failed_in(folder: Path) -> list[str]:
    """The pytest ids of the tests that failed in runs with their caches in this folder."""
    found = folder.glob("*/v/cache/lastfailed")
    return sorted(name for file in found for name in json.loads(file.read_bytes()))


def main(arguments: Sequence[str]) -> int:
    """Run all tests. Returns 0 if all passed."""
    pytest = [sys.executable, "-m", "pytest"]
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as output:
        folder, command = Path(directory), [*pytest, *arguments]
        daemons = [("daemons", f"({DAEMONS}) and not ({MACHINES} or {PATIENT})", ())]
        others = [
            ("others", f"not ({DAEMONS} or {MACHINES})", NICE),
            ("machines", MACHINES, ()),
            ("patient", f"{PATIENT} and not ({MACHINES})", NICE),
        ]
        lanes = [Lane(daemons, command, folder), Lane(others, command, folder, output.fileno())]

        def end_all(*_: object) -> None:
            for lane in lanes:
                lane.end()

        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end_all)
        codes = finish(lanes)
        print("\nThe other lane:\n", flush=True)
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
        failed = failed_in(folder)
        # Whole files, because their tests may share module-scoped fixtures.
        files = sorted({name.partition("::")[0] for name in failed})
        if set(codes) <= {0, NO_TESTS, SOME_FAILED} and 0 < len(files) <= MAX_RERUN_FILES:
            print(f"\nRunning again, alone: {', '.join(failed)}\n", flush=True)
            lanes = [Lane([("again", "", ())], [*pytest, *files], folder)]
            codes = finish(lanes)
            if codes == [0]:
                print("\nFailed in parallel and passed alone: " + ", ".join(failed), flush=True)
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
