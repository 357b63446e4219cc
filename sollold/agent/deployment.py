"""One deployment at its head: from the commit at every owner to the last byte given back.

STARTING (owners commit, workers start, tunnels open) → LOADING → READY → gone, or FAILED from anywhere.
A worker's death, an owner's, a lost grant, a tunnel that breaks and the end of ``llama-server`` all end it at
once: what is left of a deployment that lost a part can answer nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sollold.agent.command_line import Reach, plain_workers
from sollold.agent.commands import Deploy
from sollold.agent.head import LOAD_SECONDS, Head, HeadFailed
from sollold.agent.llama_find import Llama
from sollold.agent.means import Means
from sollold.agent.owners import BREAK_SECONDS, OwnerFailed, Owners
from sollold.cluster.peer import PeerError
from sollold.cluster.record import Backend, Endpoint, Placed, State
from sollold.models.model import Model

log = logging.getLogger("sollold.agent")

LOAD_STALL_SECONDS = 60.0
"""A load without progress for so long stands still, on a worker that hangs, say; see `_load_patience`."""
FIRST_SECONDS = 10.0
"""Whoever waited for the load has so long to come, however short the keep_alive is."""
_STOP_PATIENCE = 1.5


@dataclass(frozen=True, slots=True)
class Work:
    """What a deployment has done so far; it grows. ``bytes``: through its tunnels; ``processes``: the sum of
    `sollold.agent.process.Process.work` over all nodes, a few seconds old for others than the head.
    """

    processes: int
    bytes: int


class Deployment:
    """Runs as one task, `run`. All else may be called at any time from the loop.

    Attributes:
        busy: requests in it now, as the serving room counts them.
        active, waiting: of those, in the engine and in line.
        speed: tokens per second of a single stream, measured by the serving room.
        culprit: the node whose part failed, where that is known; ``crashed``: by a process' own fault.
        closing: why it takes no new work; empty while it does.
        closes_at: when it ends at the latest, whatever is in it, on the monotonic clock.
    """

    def __init__(
        self, order: Deploy, model: Model, llama: Llama, means: Means, changed: Callable[[], None]
    ) -> None:
        self.id = order.deployment
        self.term = order.term
        self.plan = order.plan
        self.keep_alive = order.keep_alive
        self.model = model
        self.state = State.STARTING
        self.progress = 0.0
        self.reason = ""
        self.culprit = ""
        self.crashed = False
        self.busy = 0
        self.active = 0
        self.waiting = 0
        self.speed = 0.0
        self.ended_at = 0.0
        self.closing = ""
        self.closes_at = float("inf")
        self.head: Head | None = None
        self._visited = False
        self._last_used = time.monotonic()
        self._progressed_at = time.monotonic()
        self._told_progress = False
        self._llama = llama
        self._means = means
        self._changed = changed
        self._fault: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answered = False
        self._head_gone = asyncio.Event()
        self._owners = Owners(order.deployment, order.plan, llama.build, means, self.end)
        self._watchers: set[asyncio.Event] = set()

    # Asked by others

    @property
    def owners(self) -> tuple[str, ...]:
        """The nodes that hold bytes for it, this one included, by node id."""
        return self._owners.nodes

    @property
    def alive(self) -> bool:
        """Whether it is neither failed nor ended."""
        return self.state is not State.FAILED and not self._fault.done()

    @property
    def url(self) -> str:
        """Where its ``llama-server`` answers; empty before it was started."""
        return self.head.url if self.head is not None else ""

    def idle(self) -> float:
        """Seconds since the last request ended; 0.0 while there is one."""
        return 0.0 if self.busy or self.active or self.waiting else time.monotonic() - self._last_used

    def work(self) -> Work | None:
        """What it has done so far; None where that can't be told."""
        # A processor waits idle for the work of most kinds of GPU.
        if any(not share.device.startswith(("CPU", "CUDA")) for share in self.plan.shares):
            return None
        workers = self._owners.work()
        head = self.head.process.work() if self.head is not None else None
        return None if workers is None or head is None else Work(workers + head, self._owners.traffic())

    def expires(self) -> float:
        """Seconds of idleness left; negative: for ever."""
        return -1.0 if self.keep_alive < 0 else max(0.0, self.keep_alive - self.idle())

    def overdue(self) -> bool:
        """Whether it was idle for longer than it is kept."""
        kept = self.keep_alive if self._visited else max(self.keep_alive, FIRST_SECONDS)
        return self.keep_alive >= 0 and self.state is State.READY and self.idle() >= kept

    def used(self) -> None:
        """A request came or ended: idleness begins anew."""
        self._visited = True
        self._last_used = time.monotonic()

    def end(
        self, reason: str, *, state: State = State.FAILED, culprit: str = "", crashed: bool = False
    ) -> None:
        """End it, with ``reason`` for people; DRAINING for an end that somebody wanted.

        ``culprit``: the node whose part failed; ``crashed``: a process there, by a fault of its own.
        """
        if self._fault.done():
            return
        self.culprit, self.crashed = culprit, crashed
        self._fault.set_result(reason)
        self._become(state, reason=reason)

    def close(self, reason: str, patience: float) -> None:
        """Take no new work, for ``reason``, and end within ``patience`` seconds of the first call."""
        if not self.closing:
            self.closing, self.closes_at = reason, time.monotonic() + patience
            self._tell()

    def reopen(self) -> None:
        """Take new work again."""
        if self.closing:
            self.closing, self.closes_at = "", float("inf")
            self._tell()

    def end_if_due(self) -> None:
        """End it if it is closing and nobody uses it any more, or they had their time."""
        used = self.busy > 0 and self.state is State.READY
        if self.closing and (not used or time.monotonic() >= self.closes_at):
            self.end(self.closing, state=State.DRAINING)

    async def head_gone(self) -> None:
        """Wait until ``llama-server`` is dead."""
        await self._head_gone.wait()

    async def change(self, timeout: float) -> None:
        """Wait for the next change, ``timeout`` seconds at most."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await event.wait()
        finally:
            self._watchers.discard(event)

    def endpoint(self) -> Endpoint:
        """What the record says of it."""
        plan = self.plan
        shares = [share for share in (plan.host, *plan.shares) if share.layers or share is plan.host]
        nodes = {share.node for share in shares}
        return Endpoint(
            id=self.id,
            model=plan.model,
            digest=plan.digest,
            backend=Backend.SHARDED if len(nodes) > 1 or plain_workers(plan) else Backend.LOCAL,
            state=self.state,
            progress=round(self.progress, 3),
            reason=self.reason,
            context=plan.run.context if plan.run.unified else plan.run.context // plan.run.slots,
            slots=plan.run.slots,
            active=self.active,
            waiting=self.waiting,
            speed=round(self.speed, 2),
            idle=round(self.idle(), 1),
            loaded=self.state in (State.READY, State.DRAINING),
            pinned=self.keep_alive < 0,
            bytes=sum(sum(devices.values()) for devices in plan.bytes_by_owner().values()),
            layers=plan.layers,
            answered=self._answered,
            placed=tuple(
                Placed(share.node, share.device, share.first, share.last, share.total) for share in shares
            ),
            expires=round(self.expires(), 1),
            embedding=plan.run.embedding,
            asked=plan.asked,
            closing=bool(self.closing),
            culprit=self.culprit,
            crashed=self.crashed,
            cpu_moe=plan.cpu_moe,
        )

    # Its life

    async def run(self) -> None:
        """Bring it up, keep it, end it. Returns when every process is dead and every owner was told."""
        work = asyncio.create_task(self._live())
        try:
            either: set[asyncio.Future[Any]] = {work, self._fault}
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if work in done and not self._fault.done():
                await self._end_by(_cause(work.exception()))
        finally:
            if not self._fault.done():
                self.end("the daemon is stopping", state=State.DRAINING)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self._end_all()

    async def _live(self) -> None:
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for node in self.owners:
                # At once: a grant that is committed runs out while its worker starts, or another's does.
                group.create_task(self._owners.renew(node, self._ready))
            reach = await self._owners.engage()
            if objection := await self._means.oracle.objection(self.plan, self.model, self._llama):
                raise HeadFailed(objection)
            self._become(State.LOADING)
            still = group.create_task(self._watch_load())
            self.head = await self._load(reach)
            still.cancel()
            self._last_used = time.monotonic()
            self.progress = 1.0
            self._answered = True
            self._become(State.READY)
            log.info(
                "%s is ready after %.1f s",
                self.plan.model,
                time.monotonic() - begin,
                extra={"deployment": self.id},
            )
            await asyncio.wait({self.head.process.exited})
            raise self.head.failure()

    def _ready(self) -> bool:
        return self.state is State.READY

    async def _end_by(self, error: BaseException | None) -> None:
        """End it for what went wrong, with the node whose part failed."""
        if isinstance(error, HeadFailed) and error.worker:
            # llama-server only knows that some worker is gone. Its owner may say more, at once.
            await asyncio.wait({self._fault}, timeout=BREAK_SECONDS)
            self.end(_sentence(error))
        elif isinstance(error, (OwnerFailed, PeerError)):
            self.end(_sentence(error), culprit=error.node)
        else:
            crashed = isinstance(error, HeadFailed) and error.crashed
            self.end(_sentence(error), culprit=self._means.node, crashed=crashed)

    async def _load(self, reach: list[Reach]) -> Head:
        """Start ``llama-server`` and wait until it answers."""
        for last in (False, False, True):
            self.head = await Head.start(
                self.plan,
                self.model,
                self._llama,
                reach,
                deployment=self.id,
                ports=self._means.ports,
                journal=self._means.journal,
                logs=self._means.logs / self.id,
                threads=self._means.threads,
                extra=self._means.extra,
                on_progress=self._progressed,
            )
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    await self.head.ready(self._means.http)
                return self.head
            except TimeoutError as error:
                raise HeadFailed(
                    f"the model was not loaded within {LOAD_SECONDS / 60:.0f} minutes"
                ) from error
            except HeadFailed as error:
                if last or not error.port:
                    raise
                await self.head.stop(0.0)
        raise AssertionError("unreachable")

    async def _watch_load(self) -> None:
        """End a load that stands still. Without any word of progress it can't be told from a slow one."""
        while not self._fault.done():
            await asyncio.sleep(1.0)
            still = time.monotonic() - self._progressed_at
            if self._told_progress and still > _load_patience(self.model, self.progress):
                self.end(f"the load stands still at {self.progress:.0%}: no progress for {still:.0f} s")

    async def _end_all(self) -> None:
        """Every process dead, every byte given back. Nothing that fails here stops the rest."""
        if self.head is not None:
            # One that failed has nothing to finish, and others wait for what it holds.
            await self.head.stop(_STOP_PATIENCE if self.state is State.DRAINING else 0.0)
        self._head_gone.set()
        await self._owners.release(self.term)
        self.ended_at = time.monotonic()
        self._changed()

    def _progressed(self, value: float) -> None:
        if value > self.progress or not self._told_progress:
            self._told_progress = True
            self.progress = value
            self._progressed_at = time.monotonic()
            self._tell()

    def _become(self, state: State, *, reason: str = "") -> None:
        if self.state is State.FAILED:
            return
        self.state = state
        self.reason = reason
        self._tell()

    def _tell(self) -> None:
        self._changed()
        for event in self._watchers:
            event.set()


def _load_patience(model: Model, progress: float) -> float:
    """Seconds until the next word of progress, which comes with each tensor, at the worst: the largest over
    a link of 5 MB/s. After the last tensor come the allocation of state and a first token.
    """
    slowest = model.size / max(model.layers, 1) / 5e6
    return (LOAD_STALL_SECONDS + slowest) * (3 if progress >= 1.0 else 1)


def _cause(error: BaseException | None) -> BaseException | None:
    """The first cause in a tree of task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sentence(error: BaseException | None) -> str:
    if error is None:
        return "it ended without a reason"
    if not isinstance(error, (HeadFailed, OwnerFailed, PeerError, LookupError, OSError)):
        log.error("a deployment failed by a fault of our own", exc_info=error)
    return str(error) or type(error).__name__
