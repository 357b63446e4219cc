"""A process of another local user that connects to a port of the daemon."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

NOBODY = 65534

_CONNECT = """
import encodings.idna, os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
link = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
print("connected", flush=True)
try:
    data = link.recv(1)
except OSError:
    data = b""
print("answered" if data else "refused", flush=True)
"""


class Stranger:
    """A process of the user nobody that is connected to a port and waits for a byte."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def outcome(self) -> str:
        """Wait for the result: ``answered`` or ``refused``. Blocks."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def leave(self) -> None:
        """Kill the process, which closes its connection. Blocks."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def stranger(port: int, host: str = "127.0.0.1") -> Iterator[Stranger]:
    """Start a process that is connected to ``port``, and kill it at the end. Blocks.

    Skips the test without root.
    """
    if os.geteuid():
        pytest.skip("only root starts programs of other users")
    # The other user may have no access to the tests' Python, so the process changes its user after the start.
    command = [sys.executable, "-I", "-S", "-c", _CONNECT, host, str(port), str(NOBODY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "connected\n"
            yield Stranger(process)
        finally:
            process.kill()
