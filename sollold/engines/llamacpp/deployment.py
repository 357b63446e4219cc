"""A deployment at its head, from the commit at every participant to the release of all memory.

STARTING (participants commit, workers start, tunnels open) → LOADING → READY → gone, or FAILED from anywhere.
The death of a worker, participant or ``llama-server``, a lost grant or a broken tunnel ends it at once: a
deployment that has lost a part can't answer anything.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sollold.cluster.gossip.record import Drafts, Endpoint, State
from sollold.cluster.net.rpc import PeerError
from sollold.engines.address import EngineAddress
from sollold.engines.commands import Deploy
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.context import DeploymentContext
from sollold.engines.llamacpp.head_loader import HeadLoader
from sollold.engines.llamacpp.kept_prompts import can_keep, key_of
from sollold.engines.llamacpp.llama_server import Head, HeadFailed
from sollold.engines.llamacpp.load_progress import LoadProgress
from sollold.engines.llamacpp.participants import BREAK_SECONDS, ParticipantFailed, Participants, Work
from sollold.engines.llamacpp.planned import planned
from sollold.machine.device import PROCESSOR
from sollold.models.model import Model
from sollold.models.stores.patient_read import no_answer
from sollold.subscribers import Subscribers
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.engines")

FIRST_SECONDS = 10.0
"""Minimum idle time before the first request, in seconds, so that clients waiting for the load can use it
even with a shorter keep_alive."""
START_SECONDS = 120.0
"""Timeout for the check of the plan and the start of ``llama-server``'s process, in seconds."""
_STOP_SECONDS = 1.5
_NODE = re.compile(r"\bnode (\w+)")
"""How messages between nodes refer to a node."""


class Deployment:
    """Runs as one task, `run`. Everything else may be called at any time on the loop.

    Attributes:
        busy: requests in it now, as counted by `serving`.
        active, waiting: of those, in the engine and queued.
        speed: tokens per second of a single stream; like ``drafts``, measured by `serving`.
        culprit: the node whose part failed, if known; ``crashed``: a process there crashed;
            ``hung``: its load stalled.
        closing: why it accepts no new work; empty while it does.
        closes_at: when it ends at the latest, on the monotonic clock, even with running requests.
    """

    def __init__(
        self,
        request: Deploy,
        model: Model,
        llama: Llama,
        context: DeploymentContext,
        changed: Callable[[], None],
        draft: Model | None = None,
    ) -> None:
        self.id = request.deployment
        self.term = request.term
        self.plan = request.plan
        self.keep_alive = request.keep_alive
        self.model = model
        self.state = State.STARTING
        self.progress = LoadProgress(model)
        self.reason = ""
        self.culprit = ""
        self.crashed = False
        self.hung = False
        self.forced = False
        self.busy = 0
        self.active = 0
        self.waiting = 0
        self.speed = 0.0
        self._loader = HeadLoader(request, model, draft, llama, context, self._progressed)
        plan = request.plan
        drafts = Drafts(plan.drafts_by, plan.run.drafts, digest=plan.draft_digest)
        self.drafts = drafts if self._loader.drafts else Drafts()
        self.ended_at = 0.0
        self.closing = ""
        self.closes_at = float("inf")
        self._was_used = False
        self._ready_since = 0.0
        self._last_used = time.monotonic()
        self._llama = llama
        self._context = context
        self._changed = changed
        self._fault: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answered = False
        self._head_gone = asyncio.Event()
        self._participants = Participants(
            request.deployment, request.plan, model, llama.build, context, self.end
        )
        # Resolved now, since the name of a lost node can't be resolved later.
        self._names = {node: context.name(node) for node in self.participants}
        self._subscribers = Subscribers(f"deployment {request.deployment}")
        self._planned = planned(request.plan)

    # For other parts

    @property
    def participants(self) -> tuple[str, ...]:
        """The ids of the nodes that hold memory for it, including this one, sorted."""
        return self._participants.nodes

    @property
    def head(self) -> Head | None:
        """Its ``llama-server``; None before that is started."""
        return self._loader.head

    @property
    def alive(self) -> bool:
        """Whether it has neither failed nor ended."""
        return self.state is not State.FAILED and not self._fault.done()

    @property
    def address(self) -> EngineAddress | None:
        """The address of its ``llama-server``; None before that is started."""
        return self.head.address if self.head is not None else None

    @property
    def in_use(self) -> bool:
        """Whether there is a request in it or in its queue."""
        return bool(self.busy or self.active or self.waiting)

    def idle(self) -> float:
        """Return the seconds since the last request ended; 0.0 while there is one."""
        return 0.0 if self.in_use else time.monotonic() - self._last_used

    def work(self) -> Work | None:
        """Return its work counters; None if unknown."""
        # With most kinds of GPU, the CPU idles while it waits for them.
        if any(not share.device.startswith((PROCESSOR, "CUDA")) for share in self.plan.shares):
            return None
        workers = self._participants.work()
        head = self.head.process.work() if self.head is not None else None
        return None if workers is None or head is None else Work(workers + head, self._participants.traffic())

    def expires(self) -> float:
        """Return the idle seconds left before it is unloaded; negative: never."""
        return -1.0 if self.keep_alive < 0 else max(0.0, self.keep_alive - self.idle())

    def overdue(self) -> bool:
        """Return whether it has been idle for longer than its keep_alive."""
        limit = self.keep_alive if self._was_used else max(self.keep_alive, FIRST_SECONDS)
        # With a keep_alive of 0 the limit is 0, too, which is also the idle time during a request.
        unused = self.state is State.READY and not self.in_use
        return unused and self.keep_alive >= 0 and self.idle() >= limit

    def used(self) -> None:
        """Restart the idle time, since a request has started or ended."""
        self._was_used = True
        self._last_used = time.monotonic()

    def end(
        self,
        reason: str,
        *,
        state: State = State.FAILED,
        culprit: str = "",
        crashed: bool = False,
        forced: bool = False,
    ) -> None:
        """End it, with ``reason`` for users; the ``state`` is DRAINING for an intended end.

        ``culprit``: the node whose part failed; ``crashed``: a process there crashed; ``forced``: its
        requests are ended, too.
        """
        if self._fault.done():
            return
        self.culprit, self.crashed, self.forced = culprit, crashed, forced
        self._fault.set_result(reason)
        self._become(state, reason=reason)

    def stop_accepting(self, reason: str, within: float) -> None:
        """Accept no new work, for ``reason``, and end at most ``within`` seconds after the first call.

        If infinite, it ends once idle, even if the reason goes away.
        """
        self.closes_at = min(self.closes_at, time.monotonic() + within)
        if not self.closing:
            self.closing = reason
            self._tell()

    def accept_again(self) -> None:
        """Accept new work again, unless it is to end once idle."""
        if self.closing and self.closes_at < float("inf"):
            self.closing, self.closes_at = "", float("inf")
            self._tell()

    def end_if_due(self) -> None:
        """End it if it is closing and unused, or its time is up."""
        used = self.busy > 0 and self.state is State.READY
        if self.closing and (not used or time.monotonic() >= self.closes_at):
            self.end(self.closing, state=State.DRAINING)

    async def head_gone(self) -> None:
        """Wait until ``llama-server`` is dead."""
        await self._head_gone.wait()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change. Returns a function that unsubscribes it."""
        return self._subscribers.add(callback)

    def endpoint(self) -> Endpoint:
        """Return its entry in the record."""
        plan, fixed = self.plan, self._planned
        return Endpoint(
            id=self.id,
            model=plan.model,
            digest=plan.digest,
            backend=fixed.backend,
            state=self.state,
            progress=round(self.progress.value, 3),
            reason=self.reason,
            context=plan.run.request_context,
            slots=plan.run.slots,
            active=self.active,
            waiting=self.waiting,
            speed=round(self.speed, 2),
            idle=round(self.idle(), 1),
            loaded=self.state in (State.READY, State.DRAINING),
            pinned=self.keep_alive < 0,
            bytes=fixed.bytes,
            layers=plan.layers,
            answered=self._answered,
            placed=fixed.placed,
            expires=round(self.expires(), 1),
            embedding=plan.run.embedding,
            asked=plan.asked,
            closing=bool(self.closing),
            culprit=self.culprit,
            crashed=self.crashed,
            hung=self.hung,
            forced=self.forced,
            ready_since=round(self._ready_since, 1) if self.state is State.READY else 0.0,
            cpu_moe=plan.cpu_moe,
            template=fixed.template,
            drafts=self.drafts,
        )

    # Life cycle

    async def run(self) -> None:
        """Load it, run it, end it. Returns once all processes are dead and all participants notified."""
        work = asyncio.create_task(self._live())
        try:
            pending: set[asyncio.Future[Any]] = {work, self._fault}
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if work in done and not self._fault.done():
                await self._end_by(_cause(work.exception()))
        finally:
            if not self._fault.done():
                self.end("the daemon is stopping", state=State.DRAINING)
            await cancel_and_wait(work)
            await self._end_all()

    async def _live(self) -> None:
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for node in self.participants:
                # At once: a committed grant could expire while its own or another worker starts.
                group.create_task(self._participants.renew(node, lambda: self.state is State.READY))
            workers = await self._participants.commit_and_connect()
            watcher = group.create_task(self._watch_load())
            if check := await self._context.fit_check.check(self.plan, self.model, self._llama):
                raise HeadFailed(check)
            self._become(State.LOADING, reason=self._loader.without)
            head = await self._loader.load(workers)
            watcher.cancel()
            if not self._loader.drafts:
                self.drafts = Drafts()
            if can_keep(self.plan, self.drafts.by):
                await self._context.prompts.restore(self._context.http, head.address, self._prompts_key())
            self._last_used = time.monotonic()
            self.progress.value = 1.0
            self._answered = True
            self._ready_since = time.time()
            self._become(State.READY, reason=self._loader.without)
            log.info(
                "%s is ready after %.1f s",
                self.plan.model,
                time.monotonic() - start,
                extra={"deployment": self.id},
            )
            await asyncio.wait({head.process.exited})
            raise head.failure()

    async def _end_by(self, error: BaseException | None) -> None:
        """End it because of ``error``, naming the node whose part failed."""
        if isinstance(error, HeadFailed) and error.worker:
            # llama-server only knows that some worker is gone. Its node may report the reason at once.
            await asyncio.wait({self._fault}, timeout=BREAK_SECONDS)
            self.end(_sentence(error))
        elif isinstance(error, (ParticipantFailed, PeerError)):
            self.end(_sentence(error), culprit=error.node)
        else:
            crashed = isinstance(error, HeadFailed) and error.crashed
            self.end(_sentence(error), culprit=self._context.node, crashed=crashed)

    async def _watch_load(self) -> None:
        """End a load that stalls."""
        waited = 0.0
        while not self._fault.done():
            await asyncio.sleep(1.0)
            waited += 1.0
            if self.head is None and waited > START_SECONDS:
                where = no_answer(self._context.keys.parent)
                self.end(f"llama-server was not started within {waited:.0f} s: {where}")
                return
            process = self.head.process if self.head is not None else None
            on_disk = process is not None and await asyncio.to_thread(process.waits_for_disk)
            work = process.work() if process is not None else None
            if work is not None:
                work += (self._participants.work() or 0) + self._participants.traffic()
            if stalled := self.progress.stalled(work, on_disk):
                if self.progress.begun:
                    why = f"loading stalled at {self.progress.value:.0%}: no progress for {stalled:.0f} s"
                else:
                    why = f"llama-server hung at startup: no activity for {stalled:.0f} s"
                if on_disk:
                    why += f". llama-server waits for a file: {no_answer(Path(self.model.files[0]).parent)}"
                # With several nodes, another one's process may be the hung one.
                self.hung = self.participants == (self._context.node,)
                self.end(why)

    async def _end_all(self) -> None:
        """Stop all processes and release all memory. Failures do not stop the rest."""
        try:
            await self._keep_prompts()
        except Exception:
            log.exception("the processed prompts of %s were not saved", self.id)
        try:
            if self.head is not None:
                # A failed one has nothing to finish, and others are waiting for its memory.
                await self.head.stop(_STOP_SECONDS if self.state is State.DRAINING else 0.0)
        finally:
            self._head_gone.set()
            try:
                await self._participants.release_grants(self.term)
            finally:
                self.ended_at = time.monotonic()
                self._changed()

    async def _keep_prompts(self) -> None:
        """Save processed prompts if it ends in an orderly way."""
        if self.head is None or self.state is not State.DRAINING or not self._answered:
            return
        if self.busy or not can_keep(self.plan, self.drafts.by):
            return
        size = sum(share.state for share in (self.plan.host, *self.plan.shares))
        prompts, address, cells = self._context.prompts, self.head.address, self.plan.run.context
        await prompts.save(self._context.http, address, self._prompts_key(), size, cells)

    def _prompts_key(self) -> str:
        return key_of(self.plan, self.model, self._llama.build, self._context.extra)

    def _progressed(self, value: float) -> None:
        if self.progress.advance(value):
            self._tell()

    def _become(self, state: State, *, reason: str = "") -> None:
        # A load may complete in the turn of the loop in which it is ended: an end is final.
        if self.state in (State.FAILED, State.DRAINING):
            return
        self.state = state
        self.reason = _NODE.sub(lambda match: self._names.get(match[1], match[0]), reason)
        self._tell()

    def _tell(self) -> None:
        self._changed()
        self._subscribers.notify()


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the first cause in a tree of exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sentence(error: BaseException | None) -> str:
    if error is None:
        return "it ended for an unknown reason"
    if not isinstance(error, (HeadFailed, ParticipantFailed, PeerError, LookupError, OSError)):
        log.error("deployment failed: internal error", exc_info=error)
    return str(error) or type(error).__name__
