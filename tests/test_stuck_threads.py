"""The daemon's process ends also when its threads hang."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from sollold.daemon.stuck_threads import StuckThreads

_PROGRAM = """
import threading
from concurrent.futures import ThreadPoolExecutor
from sollold.daemon.stuck_threads import StuckThreads

stuck = StuckThreads(0.2)
if {hangs}:
    ThreadPoolExecutor(1).submit(threading.Event().wait)
stuck.expect_end()
stuck.all_ended()
print("the loop has ended", flush=True)
"""


@pytest.mark.parametrize("hangs", [True, False])
def test_a_hanging_thread_does_not_keep_the_process_alive(hangs: bool) -> None:
    command = [sys.executable, "-c", _PROGRAM.format(hangs=hangs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stdout == "the loop has ended\n"
    assert ("did not end" in done.stderr) == hangs


def test_the_daemon_ends_also_when_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stuck = StuckThreads(60)
    monkeypatch.setattr(threading.Thread, "start", fail)
    stuck.expect_end()
    stuck.all_ended()
    assert "can't start new thread" in caplog.text
