"""The head's end of tunnels: a loopback port here that leads to a worker's loopback port on another node.

llama-server connects to the port as if the worker were local. The bytes go through TLS between the two
daemons, both proven members (`sollold.cluster.net.tunnel_server` is the other end). A worker serves one
client at a time, so a tunnel carries one connection at a time. All users of a machine can reach its loopback:
only connections of the daemon's own user, under which its engines run, are accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.splice import ProxyEnd, Traffic
from sollold.cluster.net.tunnel_server import Open
from sollold.cluster.net.view import View
from sollold.engines.llamacpp.tunnel_dialer import TunnelDialer
from sollold.machine.loopback_clients import client_users
from sollold.tasks import cancel_and_wait, start_task

log = logging.getLogger("sollold.engines")

_LOOPBACK = "127.0.0.1"
_TURN_SECONDS = 3.0
"""How long a second connection waits for the first to end, in seconds."""
_MAX_LOOKUPS = 3
"""Attempts to find a connection's user: a table that changes while being read may lack a row."""


class Tunnels:
    """All tunnels of this node as a head.

    Args:
        reach: opens connections to nodes.
        view: tunnels to a node are cut as soon as it is no longer alive.
        delay: seconds added in each direction, to test slow networks.
    """

    def __init__(self, reach: Dialer, view: View, *, delay: float = 0.0) -> None:
        self._reach = reach
        self._view = view
        self._delay = delay
        self._open: set[Tunnel] = set()
        self._unsubscribe: Callable[[], None] | None = None

    async def open(
        self,
        deployment: str,
        node: str,
        on_break: Callable[[str], None] = lambda reason: None,
        external: str = "",
    ) -> Tunnel:
        """Open a tunnel to the worker of ``deployment`` on ``node``; it connects when it is connected to.

        ``external``: address of an external worker that ``node`` names; empty: the node's own worker.

        ``on_break`` is called with the reason if the connection to the worker fails, or ends before
        llama-server has closed its own: llama-server itself would notice only when it next needs the worker.

        Raises:
            OSError: no loopback port is free.
        """
        if self._unsubscribe is None:
            self._unsubscribe = self._view.subscribe(self._cut_dead)
        tunnel = Tunnel(
            self._reach, Open(deployment, external), node, self._delay, on_break, self._open.discard
        )
        await tunnel.listen()
        self._open.add(tunnel)
        return tunnel

    async def close(self) -> None:
        """Close all tunnels."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        for tunnel in tuple(self._open):
            await tunnel.close()

    def _cut_dead(self) -> None:
        if self._open:
            live = {record.node for record in self._view.live()}
            for tunnel in tuple(self._open):
                if tunnel.node not in live:
                    tunnel.cut()


class Tunnel:
    """One tunnel.

    Attributes:
        deployment, node: identify the worker it leads to.
        port: its port on 127.0.0.1.
        traffic: bytes transferred so far.
        failure: why the last connection failed or was cut; empty if it did not.
    """

    def __init__(
        self,
        reach: Dialer,
        greeting: Open,
        node: str,
        delay: float,
        on_break: Callable[[str], None],
        closed: Callable[[Tunnel], object],
    ) -> None:
        self.deployment = greeting.deployment
        self.node = node
        self.port = 0
        self.traffic = Traffic()
        self.failure = ""
        self._name = reach.name(node)
        self._delay = delay
        self._on_break = on_break
        self._closed = closed
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: set[_LocalEnd] = set()
        self._turn = asyncio.Event()
        self._turn.set()
        self._lookup_lock = asyncio.Lock()
        self._remote = TunnelDialer(reach, node, greeting)

    async def listen(self) -> None:
        """Open the loopback port. Called by `Tunnels.open`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _LocalEnd(self, self._delay), _LOOPBACK, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._remote.prepare()

    async def close(self) -> None:
        """Close the tunnel and its port."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._remote.drop()
        for end in tuple(self._ends):
            end.abort()
        await cancel_and_wait(*self._tasks)
        self._closed(self)

    def cut(self) -> None:
        """Abort the connections because the node is gone, so that llama-server notices."""
        self._remote.drop()
        if self._ends:
            self.failure = f"{self._name} left or failed"
            log.warning(
                "tunnel to %s closed: it left or failed", self._name, extra={"deployment": self.deployment}
            )
        for end in tuple(self._ends):
            end.abort()

    def remote_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection to the worker while llama-server's is still open."""
        if self._server is not None:
            self._break(f"the tunnel to {self._name} broke: {exc or 'the other end closed it'}")

    def _break(self, reason: str) -> None:
        self.failure = reason
        log.warning("%s", reason, extra={"deployment": self.deployment})
        self._on_break(reason)

    def local_opened(self, end: _LocalEnd) -> None:
        """Handle a new local connection."""
        self._ends.add(end)
        start_task(self._tasks, self._serve(end))

    def local_closed(self, end: _LocalEnd) -> None:
        """Handle the end of a local connection."""
        self._ends.discard(end)
        if end.has_turn:
            end.has_turn = False
            self._turn.set()

    async def _serve(self, end: _LocalEnd) -> None:
        """Connect a local connection to the worker."""
        try:
            if not await self._is_own_user(end):
                end.abort()
                return
            try:
                async with asyncio.timeout(_TURN_SECONDS):
                    while not self._turn.is_set():
                        await self._turn.wait()
            except TimeoutError:
                log.warning(
                    "a second program connected to the tunnel port %d and was refused", self.port,
                    extra={"deployment": self.deployment},
                )  # fmt: skip
                end.abort()
                return
            if end not in self._ends:
                return
            self._turn.clear()
            end.has_turn = True
            greeter = await self._remote.open()
            if end.ended or end.transport.is_closing():
                # Meanwhile llama-server hung up, or `cut` or `close` was called.
                greeter.transport.abort()
                return
            remote = _RemoteEnd(self, end, self._delay)
            transport = greeter.transport
            transport.set_protocol(remote)
            remote.connection_made(transport)
            remote.join(end)
            if early := greeter.rest():
                remote.data_received(early)
            transport.resume_reading()
            end.transport.resume_reading()
            self.failure = ""
            self._remote.prepare()
        except PeerError as error:
            end.abort()
            self._break(f"no tunnel to {self._name}: {error}")
        except BaseException:
            end.abort()
            raise

    async def _is_own_user(self, end: _LocalEnd) -> bool:
        """Return whether the connection comes from a program of this daemon's own user."""
        user = None
        async with self._lookup_lock:  # at most one look-up thread per tunnel
            for _ in range(_MAX_LOOKUPS):
                peer = end.transport.get_extra_info("peername")
                users = await client_users(self.port)
                if users is None:
                    return True
                user = users.get(peer[1]) if peer else None
                if user is not None or end.ended:
                    break
        if user != os.geteuid():
            log.warning(
                "a program of %s connected to the tunnel port %d and was refused",
                "an unknown user" if user is None else f"user {user}",
                self.port,
                extra={"deployment": self.deployment},
            )
        return user == os.geteuid()


class _LocalEnd(ProxyEnd):
    """llama-server's connection."""

    def __init__(self, tunnel: Tunnel, delay: float) -> None:
        super().__init__(tunnel.traffic, up=True, delay=delay)
        self._tunnel = tunnel
        self.has_turn = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tunnel.local_opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._tunnel.local_closed(self)


class _RemoteEnd(ProxyEnd):
    """The connection to the worker's node."""

    def __init__(self, tunnel: Tunnel, local: _LocalEnd, delay: float) -> None:
        super().__init__(tunnel.traffic, up=False, delay=delay)
        self._tunnel = tunnel
        self._local = local

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._local.ended:
            self._tunnel.remote_lost(exc)
        super().connection_lost(exc)
