"""Allocation of loopback ports for child processes."""

from __future__ import annotations

import errno
import socket

LOOPBACK = "127.0.0.1"
_MAX_PORTS = 2000


class Ports:
    """Gives each child a port of its own that is free now. Not thread-safe: a bind is fast enough for the
    event loop, and without an await no port is lost to a cancellation.

    Args:
        first: lowest port to try; 0: any free port.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._taken: set[int] = set()

    def take_port(self) -> int:
        """Return a free port and reserve it until `give_back`.

        Raises:
            OSError: no port is free.
        """
        if self._first == 0:
            # The system may return a port again that we gave to a child which has not bound it yet.
            port = next(port for port in iter(lambda: _bind(0), 0) if port not in self._taken)
            self._taken.add(port)
            return port
        for port in range(self._first, min(self._first + _MAX_PORTS, 65536)):
            if port in self._taken:
                continue
            try:
                _bind(port)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise
            self._taken.add(port)
            return port
        raise OSError(errno.EADDRINUSE, f"no free port on {LOOPBACK} from {self._first} upwards")

    def give_back(self, port: int) -> None:
        """Free the port of a child that has exited."""
        self._taken.discard(port)


def _bind(port: int) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without this, a port whose last connections are in TIME_WAIT looks taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))
        return int(probe.getsockname()[1])
