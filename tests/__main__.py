"""All tests, in two runs at once: ``python -m tests [pytest's words]``.

Those with real daemons, engines, machines and browsers wait most of their time. What the processors have
left then goes to the others, which run at a lower priority, so that they don't take from what has to answer
in time.

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
from collections.abc import Sequence
from pathlib import Path

REAL = "cluster or llama or clients or systemd or browser"
SOME_FAILED, NO_TESTS = 1, 5
"""What pytest ends with when tests failed, and when it finds none that was asked for."""
FEW = 4
"""Failures in more files than this are no matter of a busy machine."""


def wait(run: subprocess.Popen[bytes]) -> int:
    """The exit code of a run. One that is interrupted still gets the time to end what it has started."""
    while True:
        try:
            return run.wait()
        except KeyboardInterrupt:  # The terminal interrupts the run too.
            continue


def failed_in(cache: Path) -> list[str]:
    """The tests that failed in the run with this cache folder, as pytest names them."""
    try:
        return sorted(json.loads((cache / "v/cache/lastfailed").read_bytes()))
    except FileNotFoundError:
        return []


def main(words: Sequence[str]) -> int:
    """Run both; 0 when all passed."""
    running: list[subprocess.Popen[bytes]] = []
    for told in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(told, lambda *_: [run.terminate() for run in running])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:

        def pytest(cache: str, *more: str) -> list[str]:
            return [sys.executable, "-m", "pytest", *words, "-o", f"cache_dir={folder}/{cache}", *more]

        others = subprocess.Popen(
            ["nice", "-n", "5", *pytest("others", "-m", f"not ({REAL})")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        real = subprocess.Popen(pytest("real", "-m", REAL))
        running[:] = [real, others]
        codes = [wait(run) for run in running]
        print("\nThe tests without real daemons:\n", flush=True)
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
        failed = [*failed_in(Path(folder, "real")), *failed_in(Path(folder, "others"))]
        # Whole files: their tests may share what they started.
        files = sorted({name.partition("::")[0] for name in failed})
        if set(codes) <= {0, NO_TESTS, SOME_FAILED} and 0 < len(files) <= FEW:
            print(f"\nOnce more, alone: {', '.join(failed)}\n", flush=True)
            running[:] = [subprocess.Popen([sys.executable, "-m", "pytest", *files])]
            codes = [wait(run) for run in running]
            if codes == [0]:
                print("\nFailed beside the others and passed alone: " + ", ".join(failed), flush=True)
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
