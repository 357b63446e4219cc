"""Fetches bytes of a model from another node over a dedicated TLS socket in a thread.

The loop's streams take about three times the CPU time per gigabyte, which limits transfers on a fast network.
One connection per thread; HTTP/1.1 as on the node port.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import tls_name
from sollold.cluster.net.rpc_server import HTTP
from sollold.errors import system_words
from sollold.models.transfer.download import SourceError, Stop

_CONNECT_SECONDS = 3.0
_IDLE_SECONDS = 30.0
_HEAD_BYTES = 16 * 1024


class DirectSource:
    """One node's files of one model, for `Downloader`. Create it on the loop."""

    PIECE = 1 << 20
    """Bytes written at a time if the rate is not limited."""

    def __init__(self, reach: Dialer, node: str, digest: str, piece: int = PIECE) -> None:
        """``piece``: bytes written at a time."""
        self.name = reach.name(node)
        self._node = node
        self._digest = digest
        self._piece = piece
        self._reach = reach
        self._lock = threading.Lock()
        self._idle: list[ssl.SSLSocket] = []

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def fetch_range(
        self, index: int, start: int, end: int, write: Callable[[int, memoryview], None], stop: Stop
    ) -> None:
        """Fetch bytes of one file and ``write`` them at their offsets. Blocks.

        Raises:
            SourceError: the node can't be reached, refused or broke off, or ``stop`` was set.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        reused = connection is not None
        try:
            if connection is None:
                connection = self._connect()
            stop.use_socket(connection)
            self._ask(connection, index, start, end)
            self._receive(connection, start, end, write)
        except (OSError, ValueError) as error:
            if connection is not None:
                connection.close()
            if reused and not stop.stopped:
                # The node may just have closed an idle connection.
                self.fetch_range(index, start, end, write, stop)
                return
            raise SourceError(f"{self.name} broke off: {system_words(error)}") from None
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        finally:
            stop.use_socket(None)
        with self._lock:
            self._idle.append(connection)

    def _connect(self) -> ssl.SSLSocket:
        failure: OSError = OSError("no address of it is known")
        # Looked up for each connection: a machine's address may change during hours of transfer.
        for address in self._reach.addresses(self._node):
            plain: socket.socket | None = None
            try:
                plain = socket.create_connection(address, timeout=_CONNECT_SECONDS)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                context = self._reach.context(HTTP)
                secured = context.wrap_socket(plain, server_hostname=tls_name(self._node))
                self._reach.sockets.watch(secured)
                secured.settimeout(_IDLE_SECONDS)
                return secured
            except OSError as error:
                failure = error
                if plain is not None:
                    plain.close()
        raise failure

    def _ask(self, connection: ssl.SSLSocket, index: int, start: int, end: int) -> None:
        request = (
            f"GET /models/{self._digest}/{index} HTTP/1.1\r\nHost: {tls_name(self._node)}\r\n"
            f"Range: bytes={start}-{end - 1}\r\n\r\n"
        )
        connection.sendall(request.encode())

    def _receive(
        self, connection: ssl.SSLSocket, start: int, end: int, write: Callable[[int, memoryview], None]
    ) -> None:
        buffer = bytearray(max(_HEAD_BYTES, self._piece))
        view = memoryview(buffer)
        head = bytearray()
        while b"\r\n\r\n" not in head:
            count = connection.recv_into(view[:_HEAD_BYTES])
            head += view[:count]
            if not count or len(head) > 2 * _HEAD_BYTES:
                raise OSError("the connection ended before the answer began")
        raw, _, rest = bytes(head).partition(b"\r\n\r\n")
        status, length = _parse_head(raw)
        if status != 206 or length != end - start:
            raise SourceError(f"{self.name} gave status {status}: {rest[:200].decode('utf-8', 'replace')}")
        if len(rest) > length:
            raise OSError("it sent more than was requested")
        write(start, memoryview(rest))
        position = start + len(rest)
        while position < end:
            filled, room = 0, min(self._piece, end - position)
            while filled < room:
                count = connection.recv_into(view[filled:room])
                if not count:
                    raise OSError("the connection ended in the middle")
                filled += count
            write(position, view[:filled])
            position += filled


def _parse_head(raw: bytes) -> tuple[int, int]:
    """Return the status and content length of a response's head.

    Raises:
        ValueError: it is malformed.
    """
    first, *lines = raw.decode("latin-1").split("\r\n")
    length = -1
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-length":
            length = int(value)
    return int(first.split(" ")[1] if " " in first else "x"), length
