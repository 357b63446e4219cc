"""A TCP proxy that adds latency, since not every kernel can delay packets."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

_PIECE = 256 * 1024


@contextlib.contextmanager
def slow_link(target: int, round_trip: float) -> Iterator[int]:
    """Run a proxy to port ``target`` on loopback that adds ``round_trip`` seconds, and yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    links: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                for link in (near, far):
                    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    links.append(link)
                _carry(near, far, round_trip / 2)
                _carry(far, near, round_trip / 2)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for link in (listener, *links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()


def _carry(source: socket.socket, sink: socket.socket, delay: float) -> None:
    """Forward bytes ``delay`` seconds after their arrival, regardless of their number."""
    pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def read() -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(_PIECE)
            except OSError:
                data = b""
            pieces.put((time.perf_counter() + delay, data))

    def write() -> None:
        while True:
            due, data = pieces.get()
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return

    for part in (read, write):
        threading.Thread(target=part, daemon=True).start()
