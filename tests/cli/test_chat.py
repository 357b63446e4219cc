"""`sollold chat` on a terminal."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path


def press_ctrl_c(terminal: int, process: int) -> None:
    """Press Ctrl-C once the process waits: an earlier signal takes effect at the next key."""
    asleep = 0
    while asleep < 5:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.02)
    os.write(terminal, b"\x03")


def test_ctrl_c_twice_ends_a_conversation_that_waits_for_input() -> None:
    controller, tty = os.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(tty, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs inherit an ignored SIGINT

    words = [sys.executable, "-m", "sollold", "chat", "any", "--node", "127.0.0.1:9"]
    process = subprocess.Popen(
        words,
        stdin=tty,
        stdout=tty,
        stderr=tty,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    try:
        output = b""
        while b">>> " not in output:
            output += os.read(controller, 4096)
        press_ctrl_c(controller, process.pid)
        while output.count(b">>> ") < 2:
            output += os.read(controller, 4096)
        assert b"/bye" in output
        press_ctrl_c(controller, process.pid)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait(10)
        os.close(controller)
        os.close(tty)
