"""HTTP to the engines of this machine."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from sollold.cluster.net.http_connection import HttpConnection, KeptConnections
from sollold.cluster.net.pour import pulled
from sollold.facts import dataclass

_CONNECT = 5.0
_IDLE = 4.0
"""Seconds for which a connection is kept: llama-server closes one after five."""


class EngineUnreachable(ConnectionError):
    """No connection to the engine could be made."""


@dataclass(frozen=True, slots=True)
class _Place:
    host: str
    port: int
    tls: bool
    prefix: str
    name: str


@lru_cache(maxsize=64)
def _place(url: str) -> _Place:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    name = parts.netloc.rpartition("@")[2]
    return _Place(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), name)


class EngineClient:
    """The connections to this machine's engines. Own it: `close`."""

    def __init__(self) -> None:
        self._connections = KeptConnections(_IDLE)

    def kept(self, url: str) -> HttpConnection | None:
        """A connection to ``url`` of an earlier request, if there is one."""
        return self._connections.take_idle(url)

    async def connect(self, url: str) -> HttpConnection:
        """A new connection to ``url``; its path is put before that of each request.

        Raises:
            EngineUnreachable: there is none.
        """
        place = _place(url)
        # It reads files.
        tls = await asyncio.to_thread(ssl.create_default_context) if place.tls else None
        try:
            async with asyncio.timeout(_CONNECT):
                _, made = await asyncio.get_running_loop().create_connection(
                    lambda: HttpConnection(place.name, place.prefix), place.host, place.port, ssl=tls
                )
        except (OSError, TimeoutError) as error:
            why = str(error) or f"no answer within {_CONNECT:g} s"
            raise EngineUnreachable(f"can't connect to {place.name}: {why}") from None
        self._connections.add(url, made)
        return made

    async def get(self, url: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body of the answer to a small request.

        Raises:
            OSError: there was none.
        """
        connection = self.kept(url) or await self.connect(url)
        try:
            status = await connection.ask("GET", path, headers, b"")
            return status, b"".join([piece async for piece in pulled(connection.pour)])
        finally:
            self.release(connection)

    def release(self, connection: HttpConnection) -> None:
        """Its answer is not needed any more: it is kept for another, or closed."""
        self._connections.release(connection)

    @property
    def connections(self) -> int:
        """How many there are, in use or kept."""
        return len(self._connections)

    def close_idle(self) -> None:
        """Close those that nobody has used for a while."""
        self._connections.close_idle()

    def close(self) -> None:
        """End all of them."""
        self._connections.close()
