"""`sollold chat` on a terminal."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios


def test_ctrl_c_ends_a_conversation_that_waits_for_its_user() -> None:
    ours, theirs = os.openpty()
    words = [sys.executable, "-m", "sollold", "chat", "any", "--node", "127.0.0.1:9"]
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )
    try:
        said = b""
        while b">>> " not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"\x03")
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
        os.close(theirs)
