"""A child process ends with its parent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_GUARD = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")
except OSError:
    pass
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Asks Linux for SIGKILL when the daemon dies, offers itself as the first to go when memory ends (the daemon
loads anew then; without the daemon everything ends), then becomes the program. A small program of its own,
since code between fork and exec is not safe in a process with threads. Python leaves SIGPIPE ignored,
and so does exec: a worker needs it ignored, or it dies when its client goes away."""


def guarded(command: Sequence[str]) -> list[str]:
    """``command`` in such a way that it dies with this process, where the system can do that."""
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
