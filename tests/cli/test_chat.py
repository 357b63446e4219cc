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
    """When it waits for its user: a signal between the prompt and that is acted on at the next key only."""
    asleep = 0
    while asleep < 5:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.02)
    os.write(terminal, b"\x03")


def test_ctrl_c_twice_ends_a_conversation_that_waits_for_its_user() -> None:
    ours, theirs = os.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit that it is ignored

    words = [sys.executable, "-m", "sollold", "chat", "any", "--node", "127.0.0.1:9"]
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    try:
        said = b""
        while b">>> " not in said:
            said += os.read(ours, 4096)
        press_ctrl_c(ours, process.pid)
        while said.count(b">>> ") < 2:
            said += os.read(ours, 4096)
        assert b"/bye" in said
        press_ctrl_c(ours, process.pid)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
        os.close(theirs)
