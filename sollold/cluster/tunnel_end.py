"""A tunnel's end at the owner: from a proved member's TLS connection to the worker's port.

That is on loopback, or at the address of a worker that others started and the owner's settings name.

The head sends one `Open`, the owner answers with one `Opened`; from then on both directions carry the
worker's bytes as they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec

from sollold.cluster.frame import FrameError, Unframer, frame
from sollold.cluster.peer import PeerError
from sollold.cluster.pump import PumpEnd, Traffic
from sollold.cluster.reach import keep_watch

log = logging.getLogger("sollold.cluster")

GREETING_LIMIT = 4096
OPEN_SECONDS = 5.0
"""From a connection to its greeting, and from that to the worker's own connection."""


@dataclass(frozen=True, slots=True)
class Open:
    """Head → owner. ``plain``: the address of a worker that others started; empty: the owner's own."""

    deployment: str
    plain: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """Owner → head. ``ok`` False: ``reason`` says why; the connection is closed."""

    ok: bool
    reason: str = ""


class WorkerLines:
    """The owner's tunnels. A worker serves one client: there is one tunnel to each at a time.

    Attributes:
        resolve: gives the worker's host and port for (caller, deployment, plain), or raises PeerError.
    """

    def __init__(self) -> None:
        self.resolve: Callable[[str, str, str], tuple[str, int]] | None = None
        self._open: dict[OwnerEnd, Open] = {}

    def enter(self, end: OwnerEnd, asked: Open) -> None:
        """``end`` is now the tunnel that was asked for. One that was there is of a client that went away."""
        for other, name in tuple(self._open.items()):
            if name == asked:
                other.end()
        self._open[end] = asked

    def leave(self, end: OwnerEnd) -> None:
        """``end`` is closed."""
        self._open.pop(end, None)

    def drop(self, node: str) -> None:
        """End the tunnels of ``node``."""
        for end in tuple(self._open):
            if end.peer == node:
                end.end()

    def close(self) -> None:
        """End all."""
        for end in tuple(self._open):
            end.end()


class OwnerEnd(asyncio.Protocol):
    """The member's connection until its greeting is answered; then a `PumpEnd` takes over."""

    def __init__(self, peer: str, lines: WorkerLines) -> None:
        self.peer = peer
        self._lines = lines
        self._greeting = Unframer(GREETING_LIMIT)
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._pump: PumpEnd | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(OPEN_SECONDS, self.end)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        self._greeting.feed(data)
        if self._task is not None:
            if self._transport is not None:
                self._transport.pause_reading()  # the head does not wait for our answer: let it wait
            return
        try:
            greeting = self._greeting.take()
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

    def end(self) -> None:
        """End the tunnel now."""
        if self._transport is not None:
            self._transport.abort()

    async def _begin(self, asked: Open) -> None:
        deployment = asked.deployment
        assert self._transport is not None
        try:
            if self._lines.resolve is None:
                raise PeerError("", "this node has no workers", transport=True)
            host, port = self._lines.resolve(self.peer, deployment, asked.plain)
        except PeerError as error:
            self._refuse(str(error))
            return
        except Exception as error:
            log.exception("the worker of deployment %s was not found", deployment)
            self._refuse(f"failed: {error}")
            return
        traffic = Traffic()
        worker = PumpEnd(traffic, up=False)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await asyncio.get_running_loop().create_connection(lambda: worker, host, port)
        except asyncio.CancelledError:
            worker.abort()  # the worker serves one client: never leave it with a forgotten one
            raise
        except (OSError, TimeoutError) as error:
            self._refuse(f"the worker of {deployment} does not answer on {host}:{port}: {error}")
            return
        if asked.plain:
            keep_watch(worker.transport)  # no daemon there tells that its machine is gone
        self._stop_timer()
        self._lines.enter(self, asked)
        transport = self._transport
        transport.write(frame(msgspec.msgpack.encode(Opened(True))))
        front = _Front(self, traffic)
        transport.set_protocol(front)
        front.connection_made(transport)
        front.join(worker)
        if early := self._greeting.rest():
            front.data_received(early)
        transport.resume_reading()

    def _refuse(self, reason: str) -> None:
        self._stop_timer()
        if self._transport is not None:
            self._transport.write(frame(msgspec.msgpack.encode(Opened(False, reason))))
            self._transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Front(PumpEnd):
    """The member's side of a tunnel at work."""

    def __init__(self, owner: OwnerEnd, traffic: Traffic) -> None:
        super().__init__(traffic, up=True)
        self._owner = owner

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._owner.connection_lost(exc)
