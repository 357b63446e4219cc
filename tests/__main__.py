"""All tests, in two runs at once: ``python -m tests [pytest's words]``.

Those with real daemons, engines, machines and browsers wait most of their time. What the processors have
left then goes to the others, which run at a lower priority, so that they don't take from what has to answer
in time.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

REAL = "cluster or llama or clients or systemd or browser"
NO_TESTS = 5
"""What pytest ends with when it finds no test that was asked for."""


def wait(run: subprocess.Popen[bytes]) -> int:
    """The exit code of a run. One that is interrupted still gets the time to end what it has started."""
    while True:
        try:
            return run.wait()
        except KeyboardInterrupt:  # The terminal interrupts the run too.
            continue


def main(words: Sequence[str]) -> int:
    """Run both; 0 when all passed."""
    pytest = [sys.executable, "-m", "pytest", *words]
    with tempfile.TemporaryFile() as output:
        # One run keeps the list of what failed last.
        others = subprocess.Popen(
            ["nice", "-n", "5", *pytest, "-p", "no:cacheprovider", "-m", f"not ({REAL})"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        real = subprocess.Popen([*pytest, "-m", REAL])
        for told in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(told, lambda *_: [run.terminate() for run in (real, others)])
        codes = [wait(real), wait(others)]
        print("\nThe tests without real daemons:\n", flush=True)
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
