"""A tunnel's end at the owner: from a proved member's TLS connection to the worker's port.

That is on loopback, or at the address of an external worker that the owner's settings name.

The head sends one `Open`, the owner answers with one `Opened`; from then on both directions carry the
worker's bytes as they are.
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

log = logging.getLogger("sollold.cluster")

GREETING_LIMIT = 4096
_MOST_HELD = 1 << 20
"""Bytes behind one request that is held back: a head that waits for its answer sends none."""
_MOST_AHEAD = 4
"""Answers that the head may have before the worker gives them: it is not to load far ahead of the worker."""
_TRIES = 3
"""To be the only client of a worker."""
OPEN_SECONDS = 5.0
"""From a connection to its greeting, and from that to the worker's own connection."""


@dataclass(frozen=True, slots=True)
class Open:
    """Head → owner. ``plain``: the address of an external worker; empty: the owner's own."""

    deployment: str
    plain: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """Owner → head. ``ok`` False: ``reason`` says why; the connection is closed."""

    ok: bool
    reason: str = ""


class WorkerTunnels:
    """The owner's tunnels. A worker serves one client: there is one tunnel to each at a time.

    Attributes:
        workers: where tunnels lead to; None on a node without any.
        ahead: heads may have an answer before the worker gives it; False once a worker gave another.
    """

    def __init__(self) -> None:
        self.workers: Workers | None = None
        self.ahead = True
        self._open: dict[TunnelServer, Open] = {}

    def enter(self, end: TunnelServer, asked: Open) -> None:
        """``end`` is now the tunnel that was asked for. One that was there is of a client that went away."""
        for other, name in tuple(self._open.items()):
            if name == asked:
                other.abort()
        self._open[end] = asked

    def leave(self, end: TunnelServer) -> None:
        """``end`` is closed."""
        self._open.pop(end, None)

    def drop_node(self, node: str) -> None:
        """End the tunnels of ``node``."""
        for end in tuple(self._open):
            if end.peer == node:
                end.abort()

    def close(self) -> None:
        """End all."""
        for end in tuple(self._open):
            end.abort()


class TunnelServer(asyncio.Protocol):
    """The member's connection until its greeting is answered; then a `ProxyEnd` takes over."""

    def __init__(self, peer: str, lines: WorkerTunnels) -> None:
        self.peer = peer
        self._lines = lines
        self._greeting = Unframer(GREETING_LIMIT)
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(OPEN_SECONDS, self.abort)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        self._greeting.feed(data)
        if self._task is not None:
            if self._transport is not None:
                self._transport.pause_reading()  # the head does not wait for our answer: let it wait
            return
        try:
            greeting = self._greeting.take_message()
            if greeting is None:
                return
            asked = msgspec.msgpack.decode(greeting, type=Open)
        except (FrameError, msgspec.DecodeError) as error:
            self._refuse(f"the tunnel's greeting was not understood: {error}")
            return
        self._task = asyncio.get_running_loop().create_task(self._begin(asked))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
        self._lines.leave(self)

    def abort(self) -> None:
        """End the tunnel now."""
        if self._transport is not None:
            self._transport.abort()

    async def _begin(self, asked: Open) -> None:
        workers, traffic = self._lines.workers, Traffic()
        if workers is None:
            self._refuse("this node has no workers")
            return
        try:
            worker = await self._connect(workers, asked, traffic)
        except PeerError as error:
            self._refuse(str(error))
            return
        except Exception as error:
            log.exception("the worker of deployment %s was not found", asked.deployment)
            self._refuse(f"failed: {error}")
            return
        assert self._transport is not None
        self._stop_timer()
        self._lines.enter(self, asked)
        transport = self._transport
        transport.write(frame(msgspec.msgpack.encode(Opened(True))))
        front = _Front(self, traffic, None if asked.plain else workers.gate(asked.deployment), worker)
        transport.set_protocol(front)
        front.connection_made(transport)
        front.join(worker)
        if early := self._greeting.rest():
            front.data_received(early)
        transport.resume_reading()

    async def _connect(self, workers: Workers, asked: Open, traffic: Traffic) -> _WorkerEnd:
        """The connection to the worker.

        Raises:
            PeerError: there is none to be had.
        """
        deployment = asked.deployment
        for _ in range(_TRIES):
            host, port = await workers.address(self.peer, deployment, asked.plain)
            worker = _WorkerEnd(traffic, self._lines)
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    await asyncio.get_running_loop().create_connection(partial(_itself, worker), host, port)
                if asked.plain:
                    keep_watch(worker.transport)  # no daemon there tells that its machine is gone
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


def _itself(end: _WorkerEnd) -> _WorkerEnd:
    return end


class _WorkerEnd(ProxyEnd):
    """The worker's side of a tunnel at work.

    A head hashes a tensor, and waits while the worker reads that from its disk. Where it is known what the
    worker will answer, the head has the answer at once and hashes the next tensor meanwhile.
    """

    def __init__(self, traffic: Traffic, lines: WorkerTunnels) -> None:
        super().__init__(traffic, up=False)
        self._lines = lines
        self._said: deque[bytes] = deque()
        """What the head was told already, and the worker will say."""
        self._heard = b""
        """Of the first of these what the worker has said."""

    def answer(self, data: bytes) -> None:
        """Tell the head what the worker will say, if the worker is not too far behind."""
        if self._lines.ahead and len(self._said) < _MOST_AHEAD:
            self._said.append(data)
            super().data_received(data)

    def data_received(self, data: bytes) -> None:
        while self._said and data:
            wanted = self._said[0]
            left = len(wanted) - len(self._heard)
            self._heard, data = self._heard + data[:left], data[left:]
            if not wanted.startswith(self._heard):
                log.warning("a worker did not read a tensor that lies in its cache: it is loaded anew")
                self._lines.ahead = False
                self.abort()
                return
            if self._heard == wanted:
                self._said.popleft()
                self._heard = b""
        if data:
            super().data_received(data)


class _Front(ProxyEnd):
    """The member's side of a tunnel at work."""

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
        if gate.held > _MOST_HELD:
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
        # The worker has the request before the head has the answer and sends what comes next.
        self._let_pass(gate, gate.release())
        if answer:
            self._worker.answer(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)
        self._owner.connection_lost(exc)
