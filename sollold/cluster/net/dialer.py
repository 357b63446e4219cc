"""Connects to a node at whichever of its addresses really leads to it.

A node has several addresses, and some of them lead elsewhere (every machine with Docker has 172.17.0.1).
So addresses are tried with short delays in between, each up to a finished TLS handshake that proves the
node's id, and the one that worked is tried first next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.identity import Identity, peer_of, tls_name
from sollold.cluster.net.open_sockets import OpenSockets
from sollold.cluster.net.rpc import PeerError
from sollold.errors import system_reason
from sollold.tasks import cancel_and_wait

P = TypeVar("P", bound=asyncio.Protocol)

HEAD_START = 0.2
"""Delay before the next address is tried as well, in seconds."""


class Dialer:
    """Opens TLS connections to nodes by their ids.

    Args:
        identity: this node's identity.
        addresses: returns the addresses of a node by its id; empty when unknown.
        name: returns a node's display name by its id.

    Attributes:
        sockets: connections from this node to others, including those used by threads.
    """

    def __init__(
        self,
        identity: Identity,
        addresses: Callable[[str], Sequence[Address]],
        name: Callable[[str], str] = str,
    ) -> None:
        self.node = identity.node
        self.name = name
        self._identity = identity
        self._addresses = addresses
        self._worked: dict[str, Address] = {}
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}
        self.sockets = OpenSockets()

    def addresses(self, node: str) -> tuple[Address, ...]:
        """Return the addresses of ``node``, the one that last worked first."""
        known = tuple(self._addresses(node))
        worked = self._worked.get(node)
        if worked is None or worked not in known:
            return known
        return (worked, *(address for address in known if address != worked))

    def worked(self, node: str, address: Address) -> None:
        """Note that ``node`` was reached at ``address``."""
        if len(self._worked) > 4096:
            self._worked.clear()
        self._worked[node] = address

    def forget_contexts(self) -> None:
        """Use the cluster's changed secret for new connections."""
        self._contexts.clear()

    def context(self, protocol: str, *, anyone: bool = False) -> ssl.SSLContext:
        """Return the cached TLS context for connecting with ALPN ``protocol``.

        Raises:
            PeerError: it can't be created: this process has too many open files.
        """
        found = self._contexts.get((protocol, anyone))
        if found is None:
            try:
                found = self._identity.client_context(protocol, anyone=anyone)
            except OSError as error:
                why = f"no connection can be made: {system_reason(error)}"
                raise PeerError("", why, transport=True) from error
            self._contexts[protocol, anyone] = found
        return found

    async def connect(
        self,
        node: str,
        protocol: str,
        make: Callable[[], P],
        *,
        timeout: float,
        addresses: Sequence[Address] | None = None,
    ) -> tuple[P, str, Address]:
        """Connect to ``node`` (empty: any member at ``addresses``) with ALPN ``protocol``.

        `connection_made` of the new protocol is called here; the connecting side must send first.

        Returns:
            The protocol, the node that responded, and its address.

        Raises:
            PeerError: no node could be reached there, or it was not ``node``.
        """
        targets = tuple(addresses) if addresses is not None else self.addresses(node)
        name = self.name(node) if node else "the node"
        if not targets:
            raise PeerError(node, f"no address of {name} is known", transport=True)
        context = self.context(protocol, anyone=not node)

        def attempt(address: Address) -> Coroutine[Any, Any, _Handshake]:
            return _attempt(address, context, tls_name(node or "member"), self.sockets.watch)

        failures: list[str] = []
        winner = await _first_connected(targets, attempt, timeout, failures)
        if winner is None:
            raise PeerError(node, f"{name} could not be reached ({'; '.join(failures)})", transport=True)
        # Without a pause before the return: from here on the connection is the caller's.
        handshake, address = winner
        found = peer_of(handshake.transport.get_extra_info("ssl_object"))
        self.worked(found, address)
        return handshake.hand_over(make()), found, address


class _Handshake(asyncio.Protocol):
    """Holds a new connection until its own protocol takes over."""

    lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def hand_over(self, protocol: P) -> P:
        """Pass the connection to ``protocol``."""
        keep_watch(self.transport)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        return protocol


async def _attempt(
    address: Address, context: ssl.SSLContext, name: str, watch: Callable[[socket.socket], None]
) -> _Handshake:
    loop = asyncio.get_running_loop()
    family, target = socket_address(address)
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # With the scope in the host name: uvloop ignores what follows the port.
        await loop.sock_connect(raw, address if "%" in address[0] else target)
    except BaseException:
        raw.close()
        raise
    watch(raw)
    # From here on the transport owns the socket, and TLS follows in a second step: cancelling it closes the
    # connection at once. With a single step, a connection whose handshake has just ended would first shut
    # down TLS and keep reading from its descriptor, which may already be reused.
    transport, handshake = await loop.create_connection(_Handshake, sock=raw)
    if transport.is_closing():
        raise ConnectionResetError("it closed the connection at once")
    handshake.transport = await _encrypted(transport, handshake, context, name)
    return handshake


async def _encrypted(
    transport: asyncio.Transport, protocol: asyncio.Protocol, context: ssl.SSLContext, name: str
) -> asyncio.Transport:
    """Perform the TLS handshake.

    Raises:
        OSError, ssl.SSLError: it failed; the connection is closed.
    """
    try:
        found = await asyncio.get_running_loop().start_tls(
            transport, protocol, context,
            server_hostname=name, ssl_handshake_timeout=10, ssl_shutdown_timeout=2,
        )  # fmt: skip
    except BaseException:
        transport.abort()
        raise
    if found is None:
        raise ConnectionAbortedError("the connection was closed during the handshake")
    return found


async def _first_connected(
    targets: Sequence[Address],
    attempt: Callable[[Address], Coroutine[Any, Any, _Handshake]],
    timeout: float,
    failures: list[str],
) -> tuple[_Handshake, Address] | None:
    """Return the first connection to one of ``targets``, tried `HEAD_START` seconds apart; None if all fail.

    The reasons are added to ``failures``.
    """
    running: dict[asyncio.Task[_Handshake], Address] = {}
    winner: tuple[_Handshake, Address] | None = None
    waiting = list(targets)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    try:
        while winner is None and (waiting or running):
            if waiting:
                address = waiting.pop(0)
                running[asyncio.create_task(attempt(address))] = address
            left = deadline - loop.time()
            if left <= 0:
                failures.append(f"no answer within {timeout:g} s")
                break
            done, _ = await asyncio.wait(
                running,
                timeout=min(HEAD_START, left) if waiting else left,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                address = running.pop(task)
                try:
                    handshake = task.result()
                except (OSError, ssl.SSLError, TimeoutError) as error:
                    failures.append(f"{address[0]}:{address[1]}: {in_words(error)}")
                    continue
                if not handshake.lost:
                    winner = handshake, address
                    break
                # The new protocol's `connection_lost` would never be called.
                failures.append(f"{address[0]}:{address[1]}: it closed the connection at once")
    finally:
        try:
            await _cancel_attempts(running)
        except BaseException:
            if winner is not None:
                winner[0].transport.abort()
            raise
    if winner is not None and winner[0].lost:
        failures.append(f"{winner[1][0]}:{winner[1][1]}: it closed the connection at once")
        return None
    return winner


async def _cancel_attempts(tasks: dict[asyncio.Task[_Handshake], Address]) -> None:
    await cancel_and_wait(*tasks)
    for task in tasks:
        if not task.cancelled() and task.exception() is None:
            task.result().transport.abort()


def socket_address(
    address: Address,
) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Return family and socket address of an IP literal, with its scope.

    Raises:
        OSError: it is not an IP literal, or its interface does not exist.
    """
    host, port = address
    if ":" not in host:
        return socket.AF_INET, (host, port)
    # An interface's number may change; addresses without one are cached.
    return _read_ipv6(host, port) if "%" in host else _cached_ipv6(host, port)


def _read_ipv6(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int, int, int]]:
    # Numeric: no name server is asked, so this does not block.
    found = socket.getaddrinfo(
        host, port, socket.AF_INET6, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    )[0][4]
    return socket.AF_INET6, (str(found[0]), int(found[1]), int(found[2]), int(found[3]))  # type: ignore[misc]


_cached_ipv6 = lru_cache(maxsize=4096)(_read_ipv6)


def keep_watch(transport: asyncio.BaseTransport, *, seconds: int = 8, always: bool = False) -> None:
    """Disable Nagle's algorithm and let the kernel close the connection if the other machine vanished.

    Keep-alive probes detect a machine that is silent for ``seconds`` while nothing is sent. With ``always``,
    TCP_USER_TIMEOUT (RFC 5482) detects it while something is sent too: only for peers that read all the
    time, since one that accepts no bytes for so long would count as vanished. Buffer sizes are left to the
    kernel, which grows them on demand.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", None), max(1, seconds // 2)),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), max(1, seconds - seconds // 2)),
    ]
    if always:
        options.append((socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", None), seconds * 1000))
    for level, option, value in options:
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, value)


def in_words(error: BaseException) -> str:
    """Return why a connection failed, as displayed to users."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if "Hostname mismatch" in error.verify_message:
            return "another node answers there"
        return "it belongs to another cluster (its certificate was made with another secret)"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there, or a firewall rejects it"
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        # asyncio replaces the system's message by its own, which repeats the address.
        return os.strerror(error.errno or 0)
    return system_reason(error)
