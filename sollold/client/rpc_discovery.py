"""External llama.cpp RPC workers: test one, or find those on the LAN.

sollold's own workers are not found: they listen only on their own machine.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sollold.client.background import run
from sollold.client.cluster import ClusterClient
from sollold.client.discovery import urls_of
from sollold.client.errors import ClientError
from sollold.engines.external.rpc_protocol import Handshake, NotAWorker

PORT = 50052
PORTS = tuple(range(PORT, PORT + 4))
_MAX_SCAN_SECONDS = 20.0


def test_rpc_backend(host: str, port: int = PORT, timeout: float = 2.0) -> bool:
    """Whether a llama.cpp RPC worker listens at ``host:port``, judged by its reply to a greeting.

    A server that accepts the connection and stays silent counts, too: a worker serves one head at a time and
    lets others wait. ``timeout``: limit for connecting, and for each reply, in seconds.
    """
    try:
        with socket.create_connection((host, port), timeout) as connection:
            return _greets(connection, time.monotonic() + timeout)
    except (OSError, UnicodeError):
        return False


# The name comes from SOLLOL's guide; pytest must not collect it.
test_rpc_backend.__test__ = False  # type: ignore[attr-defined]


def _greets(connection: socket.socket, deadline: float) -> bool:
    handshake = Handshake()
    connection.sendall(handshake.begin())
    while handshake.version is None:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = connection.recv(4096)
        except TimeoutError:
            return True
        if not data:
            return False
        try:
            answer = handshake.feed(data)
        except NotAWorker:
            return False
        if answer and handshake.version is None:
            connection.sendall(answer)
    return True


def auto_discover_rpc_backends(
    node: str | None = None, *, ports: tuple[int, ...] = PORTS
) -> list[dict[str, Any]]:
    """Find workers on the LAN: ``[{"host": …, "port": …}, …]``. Takes some seconds.

    A daemon scans, if one is reachable (``node``, else as `HybridRouter` finds it), and includes the workers
    that it uses now. Without a daemon only this machine is scanned.
    """
    try:
        addresses = [str(worker["address"]) for worker in _scanned(node) if _is_worker(worker)]
    except ClientError:
        with ThreadPoolExecutor(len(ports)) as threads:
            answers = threads.map(lambda port: test_rpc_backend("127.0.0.1", port, 1.0), ports)
            addresses = [f"127.0.0.1:{port}" for port, is_one in zip(ports, answers, strict=True) if is_one]
    found = (address.rpartition(":") for address in dict.fromkeys(addresses))
    return [{"host": host, "port": int(port)} for host, _, port in found]


def _scanned(node: str | None) -> list[dict[str, Any]]:
    async def scan() -> Any:
        client = ClusterClient(urls_of(node))
        try:
            return await client.post("/api/cluster/scan", {}, timeout=_MAX_SCAN_SECONDS)
        finally:
            await client.close()

    return list(run(scan())["workers"])


def _is_worker(found: dict[str, Any]) -> bool:
    """Whether the daemon recognized it as a worker, compatible or not."""
    return found["state"] in ("usable", "taken", "busy") or bool(found["version"])
