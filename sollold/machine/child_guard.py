"""Makes child processes die with the daemon."""

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
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    reason = "%s can't be run: %s (errno %d)" % (sys.argv[2], error.strerror, error.errno)
    print(reason, file=sys.stderr, flush=True)
    os._exit(127)
"""
"""Requests SIGKILL when the daemon dies, becomes the OOM killer's first choice (the daemon can then
reload the model, while without the daemon everything stops), then executes the program. It is a separate
program since code between fork and exec is unsafe in a process with threads. Python ignores SIGPIPE, and exec
preserves that: a worker needs it ignored, or it dies when its client disconnects."""


def guarded(command: Sequence[str]) -> list[str]:
    """Wrap ``command`` so that it dies with this process, on Linux; unchanged elsewhere."""
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
