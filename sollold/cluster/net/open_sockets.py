"""Connections with other nodes, to be ended from outside: whoever uses them waits for what never comes.

An address that a machine no longer has takes nothing and answers nothing, not even that it is gone. TCP sends
again for minutes meanwhile.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Sequence

from sollold.cluster.gossip.actions import Address


class OpenSockets:
    """The open sockets of one side. All of it from any thread."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, raw: socket.socket) -> None:
        """``raw`` is a connection with another node."""
        with self._lock:
            self._all.add(raw)

    def cut_peers(self, addresses: Collection[Address]) -> int:
        """End all connections to the node at ``addresses``, at once; how many there were."""
        return self._cut(lambda raw: literal(raw.getpeername()) in addresses)

    def cut_hosts(self, *, own: Collection[str] = (), other: Collection[str] = ()) -> int:
        """End all connections by addresses that this machine (``own``) or another one no longer has."""
        return self._cut(
            lambda raw: literal(raw.getsockname())[0] in own or literal(raw.getpeername())[0] in other
        )

    def _cut(self, meant: Callable[[socket.socket], bool]) -> int:
        with self._lock:
            known = tuple(self._all)
        cut = 0
        for raw in known:
            with contextlib.suppress(OSError):
                if meant(raw):
                    # Not TLS's own farewell: a thread may be reading there.
                    socket.socket.shutdown(raw, socket.SHUT_RDWR)
                    cut += 1
        return cut


def literal(place: Sequence[object]) -> Address:
    """The address of a socket's end: IPv4 plain, link-local IPv6 with its interface."""
    host, port = str(place[0]), int(str(place[1]))
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    scope = int(str(place[3])) if len(place) > 3 else 0
    if scope and "%" not in host:
        with contextlib.suppress(OSError):
            host = f"{host}%{socket.if_indextoname(scope)}"
    return host, port
