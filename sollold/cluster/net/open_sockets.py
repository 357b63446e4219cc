"""Tracks connections with other nodes, to close them from outside when their users would wait in vain.

An address that a machine no longer has accepts and answers nothing, not even with an error. TCP would
retransmit for minutes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Sequence

from sollold.cluster.gossip.actions import Address


class OpenSockets:
    """The open sockets of one side. Thread-safe."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, raw: socket.socket) -> None:
        """Track ``raw``, a connection with another node."""
        with self._lock:
            self._all.add(raw)

    def cut_peers(self, addresses: Collection[Address]) -> int:
        """Close all connections to the node at ``addresses`` immediately. Returns their number."""
        return self._cut(lambda raw: literal(raw.getpeername()) in addresses)

    def cut_hosts(self, *, own: Collection[str] = (), other: Collection[str] = ()) -> int:
        """Close all connections using addresses that this machine (``own``) or another one no longer has."""
        return self._cut(
            lambda raw: literal(raw.getsockname())[0] in own or literal(raw.getpeername())[0] in other
        )

    def _cut(self, matches: Callable[[socket.socket], bool]) -> int:
        with self._lock:
            known = tuple(self._all)
        cut = 0
        for raw in known:
            with contextlib.suppress(OSError):
                if matches(raw):
                    # Without a TLS shutdown: a thread may be reading there.
                    socket.socket.shutdown(raw, socket.SHUT_RDWR)
                    cut += 1
        return cut


def literal(end: Sequence[object]) -> Address:
    """Return the address of a socket's end: IPv4 plain, link-local IPv6 with its interface."""
    host, port = str(end[0]), int(str(end[1]))
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    scope = int(str(end[3])) if len(end) > 3 else 0
    if scope and "%" not in host:
        with contextlib.suppress(OSError):
            host = f"{host}%{socket.if_indextoname(scope)}"
    return host, port
