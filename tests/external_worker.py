"""A ``ggml-rpc-server`` that was not started by a daemon, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from sollold.engines.external.rpc_protocol import Handshake
from sollold.engines.install.find import Llama


def begun(llama: Llama, folder: Path) -> subprocess.Popen[bytes]:
    """Start a worker on a free loopback port. Does not wait until it listens."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port = int(link.getsockname()[1])
    with (folder / f"plain-{port}.log").open("wb") as log:
        command = [str(llama.worker), "-H", "127.0.0.1", "-p", str(port), "-d", "CPU", "-t", "1"]
        return subprocess.Popen(command, stdout=log, stderr=log, restore_signals=False)


def address_of(process: subprocess.Popen[bytes]) -> str:
    """The address on which the worker listens; empty before that.

    Asks the operating system: a worker serves one client at a time, and a connection would be that client.
    """
    for connection in psutil.Process(process.pid).net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            return f"127.0.0.1:{connection.laddr.port}"
    return ""


@contextlib.asynccontextmanager
async def started(llama: Llama, folder: Path) -> AsyncIterator[str]:
    """Run a worker within the block. Yields its address once it listens."""
    process = await asyncio.to_thread(begun, llama, folder)
    try:
        for _ in range(500):
            if address := address_of(process):
                break
            await asyncio.sleep(0.02)
        else:
            raise AssertionError("the worker did not listen within 10 s")
        yield address
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


@contextlib.asynccontextmanager
async def occupied(address: str) -> AsyncIterator[None]:
    """Be the worker's one client within the block."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    handshake = Handshake()
    writer.write(handshake.begin())
    async with asyncio.timeout(5):
        while handshake.version is None:  # the worker sends the length of its answer separately
            data = await reader.read(4096)
            assert data, "the worker hung up"
            handshake.feed(data)
    try:
        yield
    finally:
        writer.transport.abort()
