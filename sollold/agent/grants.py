"""Grants this node's memory: the I/O around the ledger. Starts and stops the workers of grants."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from sollold.agent.cache_fill import Connect
from sollold.agent.cache_fills import CacheFills
from sollold.agent.external_watch import ExternalWatch
from sollold.agent.ledger import Action, KillWorker, Ledger
from sollold.agent.memory_monitor import MEASURE_SECONDS, NO_MEASURE, MemoryMonitor
from sollold.agent.own_workers import OwnWorkers
from sollold.agent.term_file import TermFile
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import Commit, Done, FillCache, Lost, Release, Renew, Reserve, Reserved
from sollold.engines.external.workers import ExternalWorkers
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.exit_reason import crashed, exit_reason
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.process import Process
from sollold.engines.llamacpp.process_log import prune
from sollold.engines.llamacpp.rpc_worker import Worker, WorkerFailed
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.machine.devices import DeviceMeter
from sollold.machine.external_worker import external_address
from sollold.models.model import Model
from sollold.retry import LogAndRetry
from sollold.settings.paths import Places
from sollold.settings.schema import Settings
from sollold.tasks import cancel_and_wait, start_task

log = logging.getLogger("sollold.agent")

_PAUSED_SECONDS = 2 * MEASURE_SECONDS
"""Gap between two clock readings while something is granted, from which this daemon was not running."""
_REPORT_SECONDS = 3.0
_CLEAN_SECONDS = 3.0
"""Timeout for the deletion of files when the daemon stops, in seconds; the next start deletes the rest."""


class GrantManager:
    """Grants memory by order of the leader, and runs the workers of the grants.

    The constructor is long because it creates all parts.

    Args:
        node: this node's id.
        calls: to inform a head that its worker died.
        leader: returns the current term in this node's view of the cluster.
        llama: returns the llama.cpp in use, or None.
        changed: called after the grants or devices have changed.
        end_head: stops the ``llama-server`` of a deployment here, if any; returns when it is gone.
        head_process: returns that ``llama-server``, to measure its memory.
        find_model: returns the model with this digest on this node, or None.
        connect: opens another node's files of a model.
        name: returns a node's display name for its id.
    """

    def __init__(
        self,
        node: str,
        settings: Settings,
        places: Places,
        meter: DeviceMeter,
        journal: Journal,
        calls: RpcClient,
        *,
        leader: Callable[[], Term],
        llama: Callable[[], Llama | None],
        changed: Callable[[], None],
        end_head: Callable[[str, str], Awaitable[None]],
        head_process: Callable[[str], Process | None],
        find_model: Callable[[str], Model | None],
        connect: Connect,
        name: Callable[[str], str],
    ) -> None:
        self._name = name
        self._settings = settings
        self._places = places
        self._journal = journal
        self._calls = calls
        self._leader = leader
        self._llama = llama
        self._changed = changed
        self._end_head = end_head
        self._head_process = head_process
        self._ports = Ports(settings.llama.worker_port)
        cache = TensorCache(places.cache / "tensors", settings.llama.worker_cache_limit)
        self.fills = CacheFills(cache, calls, find_model, connect)
        self.workers = OwnWorkers(
            node,
            settings.llama,
            places,
            journal,
            self._ports,
            cache,
            self.fills,
            exited=self._worker_exited,
            changed=changed,
        )
        self._starting: dict[str, asyncio.Task[Done]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._loaded: set[str] = set()
        """Deployments whose heads have reported that they are loaded."""
        self._checked: set[str] = set()
        """Deployments whose external workers were free when they took them."""
        self._reports: set[asyncio.Task[None]] = set()
        self._cleaning: set[asyncio.Task[None]] = set()
        self._reserved = asyncio.Event()
        """Set when there may be a reservation, which can expire."""
        self._clock_read = time.monotonic()
        self._term_file = TermFile(places.state)
        self.ledger = Ledger(node_limit=settings.node.memory_limit, name=name)
        self.external = ExternalWorkers(
            settings.llama.rpc_backends,
            settings.llama.allow_plain_workers,
            settings.node.device_limits,
            taken=self._external_taken,
            changed=self._external_changed,
        )
        self.memory = MemoryMonitor(
            meter,
            self.external,
            self._processes,
            lambda measured: self._apply(self.ledger.measured(measured)),
        )
        self.external_watch = ExternalWatch(
            self.external, settings, places, journal, self._ports, llama, self._external_taken
        )

    async def start(self) -> None:
        """Read the newest term, clean up after an earlier run and measure; then accept reservations."""
        self.ledger.term = await asyncio.to_thread(self._term_file.read)
        await asyncio.to_thread(self._journal.kill_leftovers)
        await self.workers.clean_up()
        await self.memory.measure()
        self._apply(self.ledger.reconciled())
        self.external_watch.start()

    async def run(self) -> None:
        """Expire grants and measure memory until cancelled, even if the system runs out of files or threads.

        These are two tasks, so that a hung measurement does not delay expiry.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._expire())
            group.create_task(self.memory.run())

    async def _expire(self) -> None:
        retrying = LogAndRetry("the expiry of grants", log)
        while True:
            deadline = self.ledger.next_deadline()
            if deadline is None:
                self._reserved.clear()
                await self._reserved.wait()
                continue
            await asyncio.sleep(max(min(deadline - time.monotonic(), MEASURE_SECONDS), 0.05))
            with retrying:
                self._apply(self.ledger.expire(self._now()))

    def _now(self) -> float:
        """Return the monotonic time. If this daemon was not running (stopped, or suspended with its machine),
        all deadlines are extended by that time, since no head could renew."""
        now = time.monotonic()
        paused, self._clock_read = now - self._clock_read, now
        if paused > _PAUSED_SECONDS:
            self.ledger.postpone(paused)
        return now

    async def close(self) -> None:
        """Stop every worker."""
        await self.external_watch.close()
        for deployment in self.ledger.deployments():
            self._apply(self.ledger.end_deployment(deployment, "the daemon is stopping"))
        while self._ending:
            await asyncio.gather(*self._ending.values(), return_exceptions=True)
        if self._cleaning:
            await asyncio.wait(self._cleaning, timeout=_CLEAN_SECONDS)
        await cancel_and_wait(*self._reports, *self._cleaning)
        await self.workers.close()
        await self.memory.wait_until_measured()

    def is_checked(self, deployment: str) -> bool:
        """Return whether the external workers of ``deployment`` were free when it took them."""
        return deployment in self._checked

    async def restart_worker(self, deployment: str) -> None:
        """Replace the worker of ``deployment``, unless it is being started now; returns when that is done."""
        start = self._starting.get(deployment) or self._in_task(
            deployment, self._worker_done(deployment, self.workers.start_again(deployment))
        )
        await asyncio.wait({start})

    # Commands

    async def reserve(self, caller: str, request: Reserve) -> Reserved:
        """Peer method ``reserve``: reserve memory for a deployment, by what the devices have free now."""
        if refusal := self.ledger.unauthorized(caller, request.term, self._leader()):
            return Reserved(False, refusal)
        if not await self.memory.refresh():
            return Reserved(False, NO_MEASURE)
        reserved, actions = self.ledger.reserve(request, self._now())
        self._reserved.set()
        if refusal := await self._apply_before_answer(actions):
            self._apply(self.ledger.withdraw(request.deployment))
            return Reserved(False, refusal)
        return reserved

    async def commit(self, caller: str, request: Commit) -> Done:
        """Peer method ``commit``: turn a reservation into a grant; replies once the worker listens."""
        if caller != request.head:
            return Done(False, f"{self._name(caller)} may not commit for head {self._name(request.head)}")
        llama = self._llama()
        if llama is None:
            return Done(False, "this node has no llama.cpp yet")
        if request.build != llama.build:
            builds = f"this node has llama.cpp {llama.build}, the head {request.build}"
            return Done(False, f"{builds}: builds must match")
        done, actions = self.ledger.commit(request, self._now())
        self._apply(actions)
        if not done.ok:
            return done
        start = self._starting.get(request.deployment)
        if start is None:
            start = self._in_task(request.deployment, self._start_workers(request, llama))
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            if start.cancelled():
                return Done(False, f"deployment {request.deployment} was released while its worker started")
            raise

    async def fill(self, caller: str, request: FillCache) -> Done:
        """Peer method ``fill``: start filling the cache of our worker with what its head will send."""
        deployment = request.deployment
        if caller != request.head or self.ledger.head_of(deployment) != caller:
            return Done(False, f"{self._name(caller)} is not the head of deployment {deployment}")
        if self.workers.get(deployment) is None or request.digest != self.workers.digest(deployment):
            return Done(False, f"no worker runs here for deployment {deployment}")
        if not self._settings.llama.worker_cache:
            return Done(False, "llama.worker_cache is off on this node")
        return self.fills.begin(request, sum(self.ledger.bytes_of(deployment).values()))

    async def renew(self, caller: str, request: Renew) -> Done:
        """Peer method ``renew``: extend a grant that the head still needs, which would expire otherwise."""
        if caller != request.head:
            return Done(False, f"{self._name(caller)} may not renew for head {self._name(request.head)}")
        done, actions = self.ledger.renew(request, self._now())
        self._apply(actions)
        if done.ok and request.loaded:
            if request.deployment not in self._loaded:
                self._loaded.add(request.deployment)
                self.memory.invalidate()
            self.workers.keep_tensors(request.deployment)
            worker = self.workers.get(request.deployment)
            return replace(done, work=worker.process.work() if worker is not None else 0)
        return done

    async def release(self, caller: str, request: Release) -> Done:
        """Peer method ``release``: replies once the worker is dead and the memory free."""
        head = self.ledger.head_of(request.deployment)
        if head != caller and (refusal := self.ledger.unauthorized(caller, request.term, self._leader())):
            # A release of what is not here needs no authority.
            return Done(not head, refusal if head else "")
        done, actions = self.ledger.release(request, caller, self._now())
        if refusal := await self._apply_before_answer(actions):
            return Done(False, refusal)
        if (ending := self._ending.get(request.deployment)) is not None:
            await asyncio.shield(ending)
        return done

    async def obey(self, caller: str, term: Term) -> str:
        """Check the ``term`` of a command to the head; return why it is refused, or an empty string."""
        if refusal := self.ledger.unauthorized(caller, term, self._leader()):
            return refusal
        reason, actions = self.ledger.see(term)
        return reason or await self._apply_before_answer(actions)

    # Actions

    async def _apply_before_answer(self, actions: tuple[Action, ...]) -> str:
        """Carry out the ledger's actions before the reply to a command with a term. Returns an error or "".

        `PersistTerm` only reports a new term. Later commands of that term must wait for the disk as well, and
        after a failed write the term must still be written: so this looks at the ledger's term instead.
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
                await cancel_and_wait(start)
            await self.workers.stop(deployment)
        finally:
            self._checked.discard(deployment)
            self._loaded.discard(deployment)
            # The dead processes' memory is free now; the next grant measures it.
            self.memory.invalidate()
            self._ending.pop(deployment, None)
            self._apply(self.ledger.ended(deployment))
            # In a task: nobody may wait for the memory because of a disk that does not respond.
            start_task(self._cleaning, self._clean_up(deployment), f"files of {deployment}")

    async def _clean_up(self, deployment: str) -> None:
        """Delete the files of an ended deployment, and old logs."""
        try:
            await self.workers.delete_files(deployment)
            kept = self.ledger.deployments() | {deployment}
            await asyncio.to_thread(prune, self._places.state / "logs", kept)
        except Exception:
            log.exception("the files of %s are not deleted", deployment, extra={"deployment": deployment})

    async def _start_workers(self, request: Commit, llama: Llama) -> Done:
        """Check the external workers, which are taken from now on, and start our own worker."""
        deployment = request.deployment
        granted = self.ledger.bytes_of(deployment)
        if deployment not in self._checked:
            for address in sorted({external_address(device) for device in granted} - {""}):
                if reason := await self.external.check(address):
                    self._apply(self.ledger.end_deployment(deployment, reason))
                    return Done(False, reason)
            self._checked.add(deployment)
        if not request.devices or self.workers.get(deployment) is not None:
            return Done(True)
        size = sum(granted.get(device, 0) for device in request.devices)
        return await self._worker_done(deployment, self.workers.start(request, llama, size))

    async def _worker_done(self, deployment: str, starting: Awaitable[None]) -> Done:
        """Wait for a worker's start; if it fails, end its deployment here."""
        try:
            await starting
        except WorkerFailed as error:
            self._apply(self.ledger.end_deployment(deployment, str(error)))
            return Done(False, str(error))
        return Done(True)

    def _in_task(self, deployment: str, work: Coroutine[Any, Any, Done]) -> asyncio.Task[Done]:
        """Run the one task at a time that starts workers of ``deployment``."""
        start = self._starting[deployment] = asyncio.create_task(work)
        start.add_done_callback(lambda _: self._starting.pop(deployment, None))
        return start

    def _worker_exited(self, deployment: str, worker: Worker) -> None:
        if self.ledger.live(deployment):
            code, lines = worker.process.exited.result(), worker.process.last_lines()
            reason = exit_reason(code, lines)
            log.warning("the worker of %s exited: %s", deployment, reason, extra={"deployment": deployment})
            lost = Lost(deployment, f"a worker exited: {reason}", crashed(code, lines))
            start_task(self._reports, self._report_loss(self.ledger.head_of(deployment), lost))
            self._apply(self.ledger.end_deployment(deployment, f"its worker exited: {reason}"))

    async def _report_loss(self, head: str, lost: Lost) -> None:
        try:
            await self._calls.call(head, "lost", lost, Done, timeout=_REPORT_SECONDS)
        except PeerError as error:
            extra = {"deployment": lost.deployment}
            log.info("could not tell the head %s: %s", self._name(head), error, extra=extra)

    def _external_changed(self) -> None:
        self.memory.report()
        self._changed()

    def _external_taken(self) -> frozenset[str]:
        return frozenset(external_address(grant.device) for grant in self.ledger.grants()) - {""}

    def _processes(self) -> list[tuple[str, list[Process], dict[str, int]]]:
        found = []
        for deployment in self.ledger.deployments():
            worker = self.workers.get(deployment)
            processes = (worker.process if worker else None, self._head_process(deployment))
            loaded = self.ledger.bytes_of(deployment) if deployment in self._loaded else {}
            found.append((deployment, [process for process in processes if process is not None], loaded))
        return found
