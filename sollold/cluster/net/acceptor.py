"""Accepts TLS connections, with a limit on pending handshakes in total and per remote machine.

Each connection takes a descriptor and some sixty kilobytes from the moment it is accepted. Without a limit a
single machine could exhaust them by opening connections and sending nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence

from sollold.facts import dataclass
from sollold.tasks import cancel_and_wait, start_task

log = logging.getLogger("sollold.cluster")

PER_ADDRESS = 64
MOST = 1024
"""Maximum connections whose handshake is not finished, by default: per remote machine, and in total."""
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Encryption:
    """Encryption of a connection; ``tls`` None: plain."""

    tls: ssl.SSLContext | None


Choose = Callable[[socket.socket, bool], Awaitable[Encryption | None]]
"""(connection, whether it comes from this machine) → its encryption; None closes it."""


class Acceptor:
    """Accepts connections on listening sockets.

    Args:
        sockets: non-blocking listening sockets; closed with the acceptor.
        make: returns the protocol for a connection, after its handshake.
        choose: see `Choose`; an `OSError` or `TimeoutError` closes the connection.
        handshake: timeout of the handshake, in seconds.
        shutdown: timeout of the TLS shutdown, in seconds; None: asyncio's default.
        per_address: maximum connections from one other machine whose handshake is not finished.
        total: maximum number of all such connections.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        make: Callable[[], asyncio.BaseProtocol],
        choose: Choose,
        *,
        handshake: float,
        shutdown: float | None = None,
        per_address: int = PER_ADDRESS,
        total: int = MOST,
    ) -> None:
        self._sockets = sockets
        self._make = make
        self._choose = choose
        self._handshake = handshake
        self._shutdown = shutdown
        self._per_address = per_address
        self._total = total
        self._handshakes: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        for listener in sockets:
            start_task(self._tasks, self._accept(listener))

    async def close(self) -> None:
        """Stop accepting and close connections during their handshake; established ones stay open."""
        await cancel_and_wait(*self._tasks)
        # Only now: until then the loop watches their descriptors, which may be reused once closed.
        for listener in self._sockets:
            listener.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("can't accept connections: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            address = str(peer[0]).removeprefix("::ffff:")
            pending = self._handshakes.get(address, 0)
            # This machine also reaches itself by its own addresses.
            local = is_loopback(address) or peer[0] == connection.getsockname()[0]
            unfinished = len(self._tasks) - len(self._sockets)
            if (pending >= self._per_address and not local) or unfinished >= self._total:
                connection.close()
                continue
            self._handshakes[address] = pending + 1
            start_task(self._tasks, self._begin(connection, address, local))

    async def _begin(self, connection: socket.socket, address: str, local: bool) -> None:
        """Complete the handshake and pass the connection to its protocol, or close it."""
        loop = asyncio.get_running_loop()
        kept = False
        try:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            encryption = await self._choose(connection, local)
            if encryption is not None and encryption.tls is not None:
                kept = True
                await loop.connect_accepted_socket(
                    self._make,
                    connection,
                    ssl=encryption.tls,
                    ssl_handshake_timeout=self._handshake,
                    ssl_shutdown_timeout=self._shutdown,
                )
            elif encryption is not None:
                kept = True
                await loop.connect_accepted_socket(self._make, connection)
        except (OSError, TimeoutError) as error:
            log.debug("connection from %s closed: %s", address, error)
        finally:
            self._handshakes[address] -= 1
            if not self._handshakes[address]:
                del self._handshakes[address]
            if not kept:
                connection.close()


def is_crowded(address: str, others: Iterable[str], each: int, total: int) -> bool:
    """Whether ``address`` has its share of ``total`` beside ``others``, the addresses that have the rest.

    That is ``each``, and for all addresses of one IPv6 network half: a machine may have any number of them.
    Loopback addresses have no share of their own.
    """
    taken = list(others)
    if len(taken) >= total or is_loopback(address):
        return len(taken) >= total
    network = _network_of(address)
    beside = sum(_network_of(other) == network for other in taken) if network else 0
    return taken.count(address) >= each or beside >= total // 2


@functools.lru_cache(4096)
def _network_of(address: str) -> str:
    """Return the /64 network of an IPv6 address; empty for any other."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    return ip.exploded[:19] if ip.version == 6 else ""


@functools.lru_cache(4096)
def is_loopback(address: str) -> bool:
    """Whether ``address`` is a loopback address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
