"""I/O shell of the gossip core: drives it with packets and timers, and executes its actions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sollold.cluster.gossip.actions import (
    Action,
    Address,
    NodeEvent,
    Persist,
    PersistedState,
    PushPullWith,
    Send,
    TcpPing,
)
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.push_pull_stream import check_alive, sync
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.state_file import BackgroundWriter, KeptFile
from sollold.tasks import cancel_and_wait, log_failure, start_task

log = logging.getLogger("sollold.cluster")

_MAX_EXCHANGES = 8
"""Maximum concurrent push-pulls and TCP pings."""
_MAX_UNKNOWN = 4
"""Maximum of these to addresses without a known node: each attempt at a machine that is off takes seconds."""

_EXACT_SECONDS = 0.002
"""Precision of the timer; see `GossipRunner.do`."""


class GossipRunner:
    """Runs a `Gossip` on the event loop, and owns the cluster's tasks.

    Args:
        reach: opens connections for exchanges and TCP pings.
        state: folder of the persistent state.
        send: sends a datagram.
        changed: called with each change, in order.

    Attributes:
        gossip: the core; None before `start`.
    """

    def __init__(
        self,
        reach: Dialer,
        state: Path,
        *,
        send: Callable[[Address, bytes], None],
        changed: Callable[[NodeEvent], None],
    ) -> None:
        self.gossip: Gossip | None = None
        self._reach = reach
        self._send = send
        self._changed = changed
        self._kept = PersistedState()
        self._file = KeptFile(state)
        self._writer = BackgroundWriter(
            "the cluster's state", lambda: self._kept, self._file.write, written=self._persisted
        )
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._exchanges: set[asyncio.Task[None]] = set()
        self._exchanging = self._unknown = 0
        self._leaving = False

    async def read_kept(self) -> PersistedState:
        """Read the core's state that the last run left on disk.

        Raises:
            OSError: the folder can't be read.
        """
        self._kept = await asyncio.to_thread(self._file.read)
        return self._kept

    def start(self, gossip: Gossip) -> None:
        """Start to run ``gossip``."""
        self.gossip = gossip
        self._tick()

    def leave(self) -> None:
        """Let the core announce that this node leaves; datagrams are sent until it is closed."""
        self._leaving = True
        if self.gossip is not None:
            self.do(self.gossip.leave(time.monotonic()))

    async def close_tasks(self) -> None:
        """Cancel the timer and all tasks."""
        if self._timer is not None:
            self._timer.cancel()
        await cancel_and_wait(*self._tasks)

    async def close_file(self) -> None:
        """Finish pending writes."""
        await self._writer.close()

    def do(self, actions: list[Action]) -> None:
        """Execute actions of the core in order, and set the timer for its next wake-up."""
        for action in actions:
            self._execute(action)
        assert self.gossip is not None
        wake = self.gossip.next_wake()
        if abs(wake - self._timer_at) > _EXACT_SECONDS:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = wake
            # uvloop rounds to the millisecond and counts from when it woke: a timer that fires early, by
            # however little, would find nothing to do and be set again, several times over.
            delay = max(0.0, wake - time.monotonic()) + _EXACT_SECONDS
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task that `close_tasks` cancels; its failure is logged."""
        task = start_task(self._tasks, work, "a task of the cluster")
        task.add_done_callback(log_failure)
        return task

    def forget_others(self) -> None:
        """Forget all other nodes, and cancel exchanges with them: this node changes to another cluster."""
        for task in self._exchanges:
            task.cancel()
        if self.gossip is not None:
            self.do(self.gossip.forget_others(time.monotonic()))

    def handle_packet(self, data: bytes, source: Address) -> None:
        """Handle a received, decrypted datagram."""
        if self.gossip is not None:
            self.do(self.gossip.handle_packet(data, source, time.monotonic()))

    def answer_push_pull(self, body: bytes, source: Address | None) -> bytes:
        """Handle a received push-pull body. Returns the response; empty: none."""
        if self.gossip is None:
            return b""
        answer, actions = self.gossip.push_pull(body, source, time.monotonic())
        self.do(actions)
        return answer

    def _tick(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        if self.gossip is not None:
            self.do(self.gossip.tick(time.monotonic()))

    def _execute(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action.address, action.data)
        elif isinstance(action, NodeEvent):
            self._changed(action)
        elif isinstance(action, Persist):
            self._kept = action.kept
            self._writer.request()
        elif isinstance(action, PushPullWith):
            task = self.spawn(self._push_pull(action))
            self._exchanges.add(task)
            task.add_done_callback(self._exchanges.discard)
        elif self._exchanging < _MAX_EXCHANGES:
            self.spawn(self._tcp_ping(action))

    def _persisted(self, kept: PersistedState) -> None:
        if self.gossip is not None and not self._leaving:
            self.do(self.gossip.persisted(kept, time.monotonic()))

    async def _push_pull(self, action: PushPullWith) -> None:
        assert self.gossip is not None
        done = ""
        unknown = not action.node
        if self._exchanging < _MAX_EXCHANGES and not (unknown and self._unknown >= _MAX_UNKNOWN):
            self._exchanging += 1
            self._unknown += unknown
            try:
                first = self.gossip.push_pull_open()
                done = await sync(self._reach, action.node, action.addresses, first, self.answer_push_pull)
            except (PeerError, TimeoutError, OSError) as error:
                name = self._reach.name(action.node) if action.node else "somebody"
                log.debug("no exchange with %s at %s: %s", name, action.addresses, error)
            finally:
                self._exchanging -= 1
                self._unknown -= unknown
        self.do(self.gossip.push_pull_done(action.node or done, bool(done), time.monotonic()))

    async def _tcp_ping(self, action: TcpPing) -> None:
        assert self.gossip is not None
        self._exchanging += 1
        try:
            await check_alive(self._reach, action.node, action.addresses, action.timeout)
        except (PeerError, OSError):
            return
        finally:
            self._exchanging -= 1
        self.do(self.gossip.tcp_pong(action.sequence, time.monotonic()))
