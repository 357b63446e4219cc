"""The HTTP client for the engines of this machine."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from sollold.cluster.net.http_connection import HttpConnection, KeptConnections
from sollold.cluster.net.pour import pulled
from sollold.facts import dataclass

_CONNECT_SECONDS = 5.0
_IDLE_SECONDS = 4.0
"""Seconds for which an idle connection is kept; llama-server closes it after five."""


class EngineUnreachable(ConnectionError):
    """Connecting to the engine failed."""


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    tls: bool
    prefix: str
    name: str


@lru_cache(maxsize=64)
def _address_of(url: str) -> _Address:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    name = parts.netloc.rpartition("@")[2]
    return _Address(
        parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), name
    )


class EngineClient(KeptConnections):
    """The connections to this machine's engines, by URL. The owner calls `close`."""

    def __init__(self) -> None:
        super().__init__(_IDLE_SECONDS)

    async def connect(self, url: str) -> HttpConnection:
        """Open a new connection to ``url``, whose path is prepended to that of each request.

        Raises:
            EngineUnreachable: connecting failed.
        """
        address = _address_of(url)
        # In a thread, since it reads files.
        tls = await asyncio.to_thread(ssl.create_default_context) if address.tls else None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: HttpConnection(address.name, address.prefix), address.host, address.port, ssl=tls
                )
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer within {_CONNECT_SECONDS:g} s"
            raise EngineUnreachable(f"can't connect to {address.name}: {reason}") from None
        self.add(url, connection)
        return connection

    async def get(self, url: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Send a GET request and return the response's status and body.

        Raises:
            OSError: there was no response.
        """
        connection = self.take_idle(url) or await self.connect(url)
        try:
            status = await connection.ask("GET", path, headers, b"")
            return status, b"".join([piece async for piece in pulled(connection.pour)])
        finally:
            self.release(connection)
