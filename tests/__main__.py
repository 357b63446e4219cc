"""All tests, in two lanes at once: ``python -m tests [pytest's words]``.

Those with real daemons and engines wait most of their time. What the processors have left then goes to the
other lane: first what needs nothing real, then what boots machines, builds images and looks at pages, at last
what is patient. The first and the last run at a lower priority, so that they don't take from what has to
answer in time.

A test may fail because the machine was too busy for it. So the files of the few that failed run once more,
alone: who fails again has failed, and who passes then is named, because it waits for a time instead of a
condition.
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
"""What pytest ends with when tests failed, when it finds none that was asked for, when it is interrupted."""
FEW = 4
"""Failures in more files than this are no matter of a busy machine."""
LOOK = 0.2
"""Seconds between two looks at what runs."""


class Lane:
    """Runs of pytest, one after the other.

    Args:
        runs: name and marks of each, and what stands before its command.
        command: pytest, with what else is asked of it.
        folder: for their caches, which tell what failed.
        output: where all write; None: to the terminal.
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

    def goes_on(self) -> bool:
        """Whether one is under way: the next is started where one has ended."""
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
        """Tell what runs to clean up, and start nothing more."""
        self._left.clear()
        if self._running is not None:
            self._running.terminate()


def finish(lanes: Sequence[Lane]) -> list[int]:
    """The exit codes of all runs. One that is interrupted still gets the time to end what it has started."""
    while True:
        try:
            going = [lane.goes_on() for lane in lanes]
            if not any(going):
                return [code for lane in lanes for code in lane.codes]
            time.sleep(LOOK)
        except KeyboardInterrupt:  # The terminal interrupts the runs too.
            continue


def failed_in(folder: Path) -> list[str]:
    """The tests that failed in runs with their caches in this folder, as pytest names them."""
    found = folder.glob("*/v/cache/lastfailed")
    return sorted(name for file in found for name in json.loads(file.read_bytes()))


def main(words: Sequence[str]) -> int:
    """Run all; 0 when all passed."""
    pytest = [sys.executable, "-m", "pytest"]
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryFile() as output:
        folder, command = Path(made), [*pytest, *words]
        daemons = [("daemons", f"({DAEMONS}) and not ({MACHINES} or {PATIENT})", ())]
        others = [
            ("others", f"not ({DAEMONS} or {MACHINES})", NICE),
            ("machines", MACHINES, ()),
            ("patient", f"{PATIENT} and not ({MACHINES})", NICE),
        ]
        lanes = [Lane(daemons, command, folder), Lane(others, command, folder, output.fileno())]
        for told in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(told, lambda *_: [lane.end() for lane in lanes])
        codes = finish(lanes)
        print("\nThe other lane:\n", flush=True)
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
        failed = failed_in(folder)
        # Whole files: their tests may share what they started.
        files = sorted({name.partition("::")[0] for name in failed})
        if set(codes) <= {0, NO_TESTS, SOME_FAILED} and 0 < len(files) <= FEW:
            print(f"\nOnce more, alone: {', '.join(failed)}\n", flush=True)
            lanes = [Lane([("again", "", ())], [*pytest, *files], folder)]
            codes = finish(lanes)
            if codes == [0]:
                print("\nFailed beside the others and passed alone: " + ", ".join(failed), flush=True)
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
