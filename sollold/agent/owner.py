"""This node as the owner of its memory: the ledger's shell. It starts and ends the workers of grants."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from sollold.agent.commands import Commit, Done, Lost, Release, Renew, Reserve, Reserved
from sollold.agent.journal import Journal
from sollold.agent.last_words import last_words
from sollold.agent.ledger import Action, KillWorker, Ledger
from sollold.agent.llama_find import Llama
from sollold.agent.ports import Ports
from sollold.agent.process import Process
from sollold.agent.tensor_cache import TensorCache
from sollold.agent.term_file import TermFile
from sollold.agent.worker import Worker, WorkerFailed
from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.term import Term
from sollold.config import Settings
from sollold.machine.device import Device
from sollold.machine.devices import PROCESSOR, Machine
from sollold.machine.speed import cores
from sollold.places import Places

log = logging.getLogger("sollold.agent")

MEASURE_SECONDS = 5.0
_TELL_SECONDS = 3.0
_FRESH_SECONDS = 0.3
"""A measurement not older than this is good enough to grant on."""
_PATIENCE_SECONDS = 4.0
"""A measurement that takes longer hangs (in a driver, say): nothing is granted on it."""
_NO_MEASURE = f"the devices of this node can't be measured: no answer within {_PATIENCE_SECONDS:.0f} s"


class Owner:
    """Grants memory, whoever asks, and runs the workers of the grants.

    Args:
        node: this node's id.
        calls: to tell a head that its worker died.
        llama: the llama.cpp in use, or None while there is none.
        changed: called after the grants or the devices changed.
        end_head: ends the ``llama-server`` of a deployment here, if there is one; returns when it is gone.
        head_process: that ``llama-server``, for what it has allocated.
    """

    def __init__(
        self,
        node: str,
        settings: Settings,
        places: Places,
        machine: Machine,
        journal: Journal,
        calls: PeerCalls,
        *,
        llama: Callable[[], Llama | None],
        changed: Callable[[], None],
        end_head: Callable[[str, str], Awaitable[None]],
        head_process: Callable[[str], Process | None],
    ) -> None:
        self._node = node
        self._settings = settings
        self._places = places
        self._machine = machine
        self._journal = journal
        self._calls = calls
        self._llama = llama
        self._changed = changed
        self._end_head = end_head
        self._head_process = head_process
        self._ports = Ports(settings.llama.worker_port)
        self._cache = TensorCache(places.cache / "tensors", settings.llama.worker_cache_limit)
        self._workers: dict[str, Worker] = {}
        self._starting: dict[str, asyncio.Task[Done]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._term_file = TermFile(places.state)
        self._measured_at = float("-inf")
        self._complained = False
        self._measuring: asyncio.Task[None] | None = None
        self.ledger = Ledger(node_limit=settings.node.memory_limit)

    async def start(self) -> None:
        """Read the newest term, end what an earlier run left behind, measure; then grants are given."""
        self.ledger.term = await asyncio.to_thread(self._term_file.read)
        await asyncio.to_thread(self._journal.clear_up)
        await asyncio.to_thread(self._cache.clear_up)
        await self.measure()
        self._apply(self.ledger.reconciled())

    async def run(self) -> None:
        """Expire and measure, until cancelled. Two tasks: a measurement that hangs stops no expiry."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._expire())
            group.create_task(self._keep_measuring())

    async def _expire(self) -> None:
        while True:
            deadline = self.ledger.next_deadline()
            wait = MEASURE_SECONDS if deadline is None else min(deadline - time.monotonic(), MEASURE_SECONDS)
            await asyncio.sleep(max(wait, 0.05))
            self._apply(self.ledger.expire(time.monotonic()))

    async def _keep_measuring(self) -> None:
        while True:
            await asyncio.sleep(max(0.05, self._measured_at + MEASURE_SECONDS - time.monotonic()))
            if time.monotonic() - self._measured_at >= MEASURE_SECONDS - 0.1:
                await self.measure()

    async def close(self) -> None:
        """End every worker."""
        for deployment in {grant.deployment for grant in self.ledger.grants()}:
            self._apply(self.ledger.end(deployment, "the daemon is stopping"))
        while self._ending:
            await asyncio.gather(*self._ending.values(), return_exceptions=True)
        for telling in self._telling:
            telling.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
        if self._measuring is not None:
            await asyncio.wait([self._measuring], timeout=_PATIENCE_SECONDS)

    async def measure(self) -> bool:
        """Measure the devices now, or share in a measurement that is under way.

        False when it is not done within `_PATIENCE_SECONDS`: then it goes on by itself.
        """
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(self._measure())
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await asyncio.shield(self._measuring)
        except TimeoutError:
            if not self._complained:
                self._complained = True
                log.warning("%s", _NO_MEASURE)
            return False
        self._complained = False
        return True

    def worker_port(self, caller: str, deployment: str) -> int:
        """The port of the worker of ``deployment``, for its head alone.

        Raises:
            LookupError: there is none, or ``caller`` is not its head; the sentence says which.
        """
        worker = self._workers.get(deployment)
        if worker is None or not self.ledger.live(deployment):
            raise LookupError(f"no worker runs here for deployment {deployment}")
        if not any(one.head == caller for one in self.ledger.grants() if one.deployment == deployment):
            raise LookupError(f"{caller} is not the head of deployment {deployment}")
        return worker.port

    # Commands

    async def reserve(self, caller: str, request: Reserve) -> Reserved:
        """See `Ledger.reserve`; measured first."""
        if time.monotonic() - self._measured_at > _FRESH_SECONDS and not await self.measure():
            return Reserved(False, _NO_MEASURE)
        reserved, actions = self.ledger.reserve(request, time.monotonic())
        refusal = await self._carry_out(actions)
        if refusal:
            return Reserved(False, refusal)
        return reserved

    async def commit(self, caller: str, request: Commit) -> Done:
        """See `Ledger.commit`; done when the worker listens."""
        if caller != request.head:
            return Done(False, f"{caller} commits for {request.head}")
        llama = self._llama()
        if llama is None:
            return Done(False, "there is no llama.cpp on this node yet")
        if request.build != llama.build:
            return Done(
                False, f"this node has llama.cpp {llama.build}, the head {request.build}: they don't mix"
            )
        done, actions = self.ledger.commit(request, time.monotonic())
        self._apply(actions)
        if not done.ok or not request.devices or request.deployment in self._workers:
            return done
        start = self._starting.get(request.deployment)
        if start is None:
            start = asyncio.create_task(self._start_worker(request, llama))
            self._starting[request.deployment] = start
            start.add_done_callback(lambda _: self._starting.pop(request.deployment, None))
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            if start.cancelled():
                return Done(False, f"deployment {request.deployment} was released while its worker started")
            raise

    async def renew(self, caller: str, request: Renew) -> Done:
        """See `Ledger.renew`."""
        if caller != request.head:
            return Done(False, f"{caller} renews for {request.head}")
        done, actions = self.ledger.renew(request, time.monotonic())
        self._apply(actions)
        if done.ok and request.loaded:
            worker = self._workers.get(request.deployment)
            if worker is not None:
                await asyncio.to_thread(self._cache.keep, request.deployment)
        return done

    async def release(self, caller: str, request: Release) -> Done:
        """See `Ledger.release`; done when the worker is dead and the bytes are free."""
        done, actions = self.ledger.release(request, caller, time.monotonic())
        refusal = await self._carry_out(actions)
        if refusal:
            return Done(False, refusal)
        ending = self._ending.get(request.deployment)
        if ending is not None:
            await asyncio.shield(ending)
        return done

    async def obey(self, term: Term) -> str:
        """A command for the head carries ``term``: why it is not obeyed, or empty."""
        reason, actions = self.ledger.see(term)
        return reason or await self._carry_out(actions)

    # Actions

    async def _carry_out(self, actions: tuple[Action, ...]) -> str:
        """Do what the ledger wants before a command with a term is answered. What went wrong, or empty.

        The ledger says with `PersistTerm` that the term rose. The next command of that term must wait for
        the disk as well, and after a write that failed the term is still to be written: so it is the term
        that is looked at.
        """
        self._apply(actions)
        return await self._term_file.keep(self.ledger.term)

    def _apply(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, KillWorker) and action.deployment not in self._ending:
                task = asyncio.create_task(self._end(action.deployment, action.reason))
                self._ending[action.deployment] = task
        if actions:
            self._changed()

    async def _end(self, deployment: str, reason: str) -> None:
        log.info("ending %s: %s", deployment, reason, extra={"deployment": deployment})
        try:
            await self._end_head(deployment, reason)
            if (start := self._starting.get(deployment)) is not None:
                start.cancel()
                await asyncio.gather(start, return_exceptions=True)
            if (worker := self._workers.pop(deployment, None)) is not None:
                await worker.stop()
            await asyncio.to_thread(self._cache.close, deployment)
        finally:
            # What the dead processes held is free now; the next grant measures it.
            self._measured_at = float("-inf")
            self._ending.pop(deployment, None)
            self._apply(self.ledger.ended(deployment))

    async def _start_worker(self, request: Commit, llama: Llama) -> Done:
        deployment = request.deployment
        cache: Path | None = None
        if self._settings.llama.worker_cache and request.head != self._node:
            size = sum(self.ledger.bytes_of(deployment).values())
            cache = await asyncio.to_thread(self._cache.open, deployment, size)
        try:
            worker = await Worker.start(
                llama,
                request.devices,
                deployment=deployment,
                ports=self._ports,
                journal=self._journal,
                logs=self._places.state / "logs" / deployment,
                threads=self._settings.llama.threads or cores(),
                cache=cache,
            )
        except WorkerFailed as error:
            self._apply(self.ledger.end(deployment, str(error)))
            return Done(False, str(error))
        self._workers[deployment] = worker
        worker.process.exited.add_done_callback(lambda exited: self._worker_exited(deployment, worker))
        return Done(True)

    def _worker_exited(self, deployment: str, worker: Worker) -> None:
        if self._workers.get(deployment) is worker and self.ledger.live(deployment):
            why = last_words(worker.process.exited.result(), worker.process.last_lines())
            log.warning("the worker of %s is gone: %s", deployment, why, extra={"deployment": deployment})
            head = next(one.head for one in self.ledger.grants() if one.deployment == deployment)
            telling = asyncio.create_task(self._tell(head, Lost(deployment, f"a worker is gone: {why}")))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
            self._apply(self.ledger.end(deployment, f"its worker is gone: {why}"))

    async def _tell(self, head: str, lost: Lost) -> None:
        try:
            await self._calls.call(head, "lost", lost, Done, timeout=_TELL_SECONDS)
        except PeerError as error:
            log.info("the head %s was not told: %s", head, error, extra={"deployment": lost.deployment})

    async def _measure(self) -> None:
        processes = dict(self._processes())
        devices, allocated = await asyncio.to_thread(self._look, processes)
        self._measured_at = time.monotonic()
        self._apply(self.ledger.measured(devices, allocated, self._machine.reserves()))

    def _look(
        self, processes: dict[str, list[Process]]
    ) -> tuple[tuple[Device, ...], dict[str, dict[str, int]]]:
        """The devices, and what each deployment has allocated by now. Blocks."""
        measurement = self._machine.measure()
        allocated: dict[str, dict[str, int]] = {}
        for deployment, running in processes.items():
            sizes = allocated.setdefault(deployment, {})
            for process in running:
                sizes[PROCESSOR] = sizes.get(PROCESSOR, 0) + process.memory()
                for device, size in measurement.processes.get(process.pid, {}).items():
                    sizes[device] = sizes.get(device, 0) + size
        return measurement.devices, allocated

    def _processes(self) -> list[tuple[str, list[Process]]]:
        found = []
        for deployment in {grant.deployment for grant in self.ledger.grants()}:
            worker = self._workers.get(deployment)
            both = (worker.process if worker else None, self._head_process(deployment))
            found.append((deployment, [one for one in both if one is not None]))
        return found
