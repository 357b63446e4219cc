"""Commands of sollold on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
"""The escape sequences that hide and show the cursor."""


class TerminalCommand:
    """A command on its own pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.controller, self.tty = os.openpty()
        self.before = termios.tcgetattr(self.tty)
        self.output = b""

        def take_the_terminal() -> None:
            fcntl.ioctl(self.tty, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # background jobs inherit ignored signals

        self.process = subprocess.Popen(
            [sys.executable, "-m", "sollold", *arguments],
            stdin=self.tty,
            stdout=self.tty,
            stderr=self.tty,
            start_new_session=True,
            preexec_fn=take_the_terminal,
            env={**os.environ, "TERM": "xterm"},
        )

    def is_drawing(self) -> bool:
        """Return whether the command draws on the terminal and hides the cursor."""
        return HIDE in self.output and bool(self.output.rpartition(HIDE)[2].strip())

    def read_until(self, done: Callable[[], bool]) -> None:
        """Read the output until ``done`` is true, for at most 30 s."""
        end = time.monotonic() + 30
        while not done():
            assert time.monotonic() < end, self.output
            if select.select([self.controller], [], [], 0.05)[0]:
                self.output += os.read(self.controller, 1 << 16)

    def read_until_asleep(self) -> None:
        """Read until the process waits. An earlier signal would take effect only at its next input."""
        asleep = 0

        def waits() -> bool:
            nonlocal asleep
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0
            return asleep >= 5

        self.read_until(waits)

    def send(self, number: signal.Signals) -> None:
        """Send a signal once the command has drawn and waits."""
        self.read_until(self.is_drawing)
        self.read_until_asleep()
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C once the command waits for input."""
        self.read_until_asleep()
        os.write(self.controller, b"\x03")

    def exit_status(self) -> int:
        """Read the rest of the output and return the exit status."""
        self.read_until(lambda: self.process.poll() is not None)
        while select.select([self.controller], [], [], 0)[0]:
            self.output += os.read(self.controller, 1 << 16)
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.controller)
        os.close(self.tty)
