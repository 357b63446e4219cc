"""An HTTP proxy on loopback: ``CONNECT`` and absolute URLs, with optional Basic authentication."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from urllib.parse import urlsplit


class HttpProxy:
    """Forwards all requests to one server, whatever host they name, so that names need not resolve.

    Args:
        target: host and port of that server.
        login: the ``user:password`` that it requires; empty: no authentication.
    """

    def __init__(self, target: tuple[str, int], login: str = "") -> None:
        self._target = target
        self._login = login
        self.asked: list[str] = []
        """``METHOD host:port`` of every request received."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Start the proxy. Returns its port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop the proxy and cancel active requests."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            await self._exchange(reader, writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.rstrip().split("\r\n")
        method, url, _ = first.split()
        host = url if method == "CONNECT" else urlsplit(url).netloc
        self.asked.append(f"{method} {host}")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        wanted = "basic " + base64.b64encode(self._login.encode()).decode().lower()
        if self._login and headers.get("proxy-authorization") != wanted:
            writer.write(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            return
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        with contextlib.closing(server_writer):
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = url.split(host, 1)[1] or "/"
                kept = [line for line in lines if not line.lower().startswith(("proxy-", "connection:"))]
                server_writer.write(
                    "\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close"]).encode()
                )
                server_writer.write(b"\r\n\r\n")
            copies = [
                asyncio.ensure_future(_copy(reader, server_writer)),
                asyncio.ensure_future(_copy(server_reader, writer)),
            ]
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            for copy in copies:
                copy.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
