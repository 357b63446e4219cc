"""The owner's end of a tunnel: from an authenticated member's TLS connection to the worker's port.

The worker listens on loopback, or is an external worker at an address named by the owner's settings.

The head sends one `Open`, the owner responds with one `Opened`; after that both directions carry the
worker's bytes unchanged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import cast

import msgspec

from sollold.cluster.net.dialer import keep_watch
from sollold.cluster.net.framing import FrameError, Unframer, frame
from sollold.cluster.net.gate import Gate
from sollold.cluster.net.rpc import PeerError, Workers
from sollold.cluster.net.splice import ProxyEnd, Traffic
from sollold.facts import dataclass
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

GREETING_LIMIT = 4096
_MAX_HELD_BYTES = 1 << 20
"""Maximum bytes behind a held request: a head that waits for its response sends none."""
_MAX_AHEAD = 4
"""Maximum responses sent before the worker's own: the head must not get far ahead of the worker."""
_MAX_TRIES = 3
"""Attempts to be a worker's only client."""
OPEN_SECONDS = 5.0
"""Timeout in seconds of the greeting, and of the connection to the worker."""


@dataclass(frozen=True, slots=True)
class Open:
    """Head → owner. ``plain``: address of an external worker; empty: the owner's own worker."""

    deployment: str
    plain: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """Owner → head. ``ok`` False: refused for ``reason``; the connection is closed."""

    ok: bool
    reason: str = ""


class WorkerTunnels:
    """The owner's tunnels. A worker serves one client, so there is one tunnel per worker.

    Attributes:
        workers: targets of tunnels; None on a node without workers.
        ahead: heads may get a predicted response before the worker's own; False once one was wrong.
    """

    def __init__(self) -> None:
        self.workers: Workers | None = None
        self.ahead = True
        self._open: dict[TunnelServer, Open] = {}

    def enter(self, end: TunnelServer, request: Open) -> None:
        """Register ``end`` as the tunnel for ``request``; abort an earlier one, whose client is gone."""
        for other, name in tuple(self._open.items()):
            if name == request:
                other.abort()
        self._open[end] = request

    def leave(self, end: TunnelServer) -> None:
        """Remove a closed tunnel."""
        self._open.pop(end, None)

    def drop_node(self, node: str) -> None:
        """Abort the tunnels of ``node``."""
        for end in tuple(self._open):
            if end.peer == node:
                end.abort()

    def close(self) -> None:
        """Abort all tunnels."""
        for end in tuple(self._open):
            end.abort()


class TunnelServer(asyncio.Protocol):
    """The member's connection until its greeting is processed; then a `ProxyEnd` takes over."""

    def __init__(self, peer: str, tunnels: WorkerTunnels) -> None:
        self.peer = peer
        self._tunnels = tunnels
        self._greeting = Unframer(GREETING_LIMIT)
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and start the timeout."""
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(OPEN_SECONDS, self.abort)

    def data_received(self, data: bytes) -> None:
        """Read the greeting."""
        self._greeting.feed(data)
        if self._task is not None:
            if self._transport is not None:
                self._transport.pause_reading()  # the head sends before our answer: make it wait
            return
        try:
            greeting = self._greeting.take_message()
            if greeting is None:
                return
            request = msgspec.msgpack.decode(greeting, type=Open)
        except (FrameError, *UNDECODABLE) as error:
            self._refuse(f"the tunnel's greeting is invalid: {error}")
            return
        self._task = asyncio.get_running_loop().create_task(self._begin(request))

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
        self._tunnels.leave(self)

    def abort(self) -> None:
        """Abort the tunnel."""
        if self._transport is not None:
            self._transport.abort()

    async def _begin(self, request: Open) -> None:
        workers, traffic = self._tunnels.workers, Traffic()
        if workers is None:
            self._refuse("this node has no workers")
            return
        try:
            worker = await self._connect(workers, request, traffic)
        except PeerError as error:
            self._refuse(str(error))
            return
        except Exception as error:
            log.exception("connecting to the worker of deployment %s failed", request.deployment)
            self._refuse(f"failed: {error}")
            return
        assert self._transport is not None
        self._stop_timer()
        self._tunnels.enter(self, request)
        transport = self._transport
        transport.write(frame(msgspec.msgpack.encode(Opened(True))))
        front = _HeadEnd(self, traffic, None if request.plain else workers.gate(request.deployment), worker)
        transport.set_protocol(front)
        front.connection_made(transport)
        front.join(worker)
        if early := self._greeting.rest():
            front.data_received(early)
        transport.resume_reading()

    async def _connect(self, workers: Workers, request: Open, traffic: Traffic) -> _WorkerEnd:
        """Connect to the worker.

        Raises:
            PeerError: no connection is possible.
        """
        deployment = request.deployment
        for _ in range(_MAX_TRIES):
            host, port = await workers.address(self.peer, deployment, request.plain)
            worker = _WorkerEnd(traffic, self._tunnels)
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    await asyncio.get_running_loop().create_connection(partial(_identity, worker), host, port)
                if request.plain:
                    keep_watch(worker.transport)  # no daemon there reports the loss of its machine
                    return worker
                if await workers.connected(deployment):
                    return worker
            except (OSError, TimeoutError) as error:
                reason = f"the worker of {deployment} does not answer on {host}:{port}: {error}"
                raise PeerError("", reason, transport=True) from None
            except BaseException:
                worker.abort()  # the worker serves one client: never leave it with a forgotten one
                raise
            worker.abort()
        reason = f"other programs on this machine connect to the worker of {deployment}"
        raise PeerError("", reason, transport=True)

    def _refuse(self, reason: str) -> None:
        self._stop_timer()
        if self._transport is not None:
            self._transport.write(frame(msgspec.msgpack.encode(Opened(False, reason))))
            self._transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _identity(end: _WorkerEnd) -> _WorkerEnd:
    return end


class _WorkerEnd(ProxyEnd):
    """The worker's side of an established tunnel.

    A head hashes a tensor, then waits while the worker reads it from its disk. If the worker's response can
    be predicted, the head gets it at once and hashes the next tensor meanwhile.
    """

    def __init__(self, traffic: Traffic, tunnels: WorkerTunnels) -> None:
        super().__init__(traffic, up=False)
        self._tunnels = tunnels
        self._predicted: deque[bytes] = deque()
        """Responses already sent to the head, which the worker has yet to give."""
        self._received = b""
        """Received part of the first of these."""

    def answer(self, data: bytes) -> None:
        """Send the head the worker's predicted response, unless the worker is too far behind."""
        if self._tunnels.ahead and len(self._predicted) < _MAX_AHEAD:
            self._predicted.append(data)
            super().data_received(data)

    def data_received(self, data: bytes) -> None:
        while self._predicted and data:
            wanted = self._predicted[0]
            left = len(wanted) - len(self._received)
            self._received, data = self._received + data[:left], data[left:]
            if not wanted.startswith(self._received):
                log.warning("a worker did not read a tensor from its cache: the model is loaded again")
                self._tunnels.ahead = False
                self.abort()
                return
            if self._received == wanted:
                self._predicted.popleft()
                self._received = b""
        if data:
            super().data_received(data)


class _HeadEnd(ProxyEnd):
    """The member's side of an established tunnel."""

    def __init__(self, owner: TunnelServer, traffic: Traffic, gate: Gate | None, worker: _WorkerEnd) -> None:
        super().__init__(traffic, up=True)
        self._owner = owner
        self._gate = gate
        self._worker = worker
        self._waiting: asyncio.Task[None] | None = None

    def data_received(self, data: bytes) -> None:
        gate = self._gate
        if gate is None:
            super().data_received(data)
            return
        self._let_pass(gate, gate.feed(data))
        if gate.held > _MAX_HELD_BYTES:
            self._let_pass(gate, gate.release_all())

    def _let_pass(self, gate: Gate, passed: bytes) -> None:
        if passed:
            super().data_received(passed)
        if gate.over:
            self._gate = None
        elif gate.asked is not None and self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._settle(gate))

    async def _settle(self, gate: Gate) -> None:
        answer = await gate.settle()
        self._waiting = None
        if self.ended or gate.over:
            return
        # The worker gets the request before the head gets the response and sends its next one.
        self._let_pass(gate, gate.release())
        if answer:
            self._worker.answer(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)
        self._owner.connection_lost(exc)
