"""A ``ggml-rpc-server`` that somebody else has started, for tests."""

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
    """One on a free port of loopback; it does not listen at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with (folder / f"plain-{port}.log").open("wb") as log:
        command = [str(llama.worker), "-H", "127.0.0.1", "-p", str(port), "-d", "CPU", "-t", "1"]
        return subprocess.Popen(command, stdout=log, stderr=log, restore_signals=False)


def address_of(process: subprocess.Popen[bytes]) -> str:
    """Where it listens; empty before that. A connection would be its one client, so the system is asked."""
    for one in psutil.Process(process.pid).net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN:
            return f"127.0.0.1:{one.laddr.port}"
    return ""


@contextlib.asynccontextmanager
async def started(llama: Llama, folder: Path) -> AsyncIterator[str]:
    """One that listens; its address."""
    process = await asyncio.to_thread(begun, llama, folder)
    try:
        for _ in range(500):
            if address := address_of(process):
                break
            await asyncio.sleep(0.02)
        yield address
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


@contextlib.asynccontextmanager
async def occupied(address: str) -> AsyncIterator[None]:
    """Another client has the worker at ``address``."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    handshake = Handshake()
    writer.write(handshake.begin())
    async with asyncio.timeout(5):
        while handshake.version is None:  # the worker sends its answer's length by itself
            data = await reader.read(4096)
            assert data, "the worker hung up"
            handshake.feed(data)
    try:
        yield
    finally:
        writer.transport.abort()
