"""This node as the owner of its memory: the ledger's shell. It starts and ends the workers of grants."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from sollold.agent.commands import Commit, Done, Lost, Release, Renew, Reserve, Reserved
from sollold.agent.journal import Journal
from sollold.agent.last_words import crashed, last_words
from sollold.agent.ledger import Action, KillWorker, Ledger
from sollold.agent.llama_find import Llama
from sollold.agent.plain_probe import own_protocol
from sollold.agent.plain_scan import PORTS, hosts_beside, scan
from sollold.agent.plain_workers import PlainWorkers
from sollold.agent.ports import LOOPBACK, Ports
from sollold.agent.process import Process
from sollold.agent.process_log import prune
from sollold.agent.rpc_protocol import Version
from sollold.agent.tensor_cache import TensorCache
from sollold.agent.term_file import TermFile
from sollold.agent.worker import Worker, WorkerFailed
from sollold.cluster.interfaces import interfaces
from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.term import Term
from sollold.config import Settings
from sollold.machine.devices import PROCESSOR, Machine, Measurement
from sollold.machine.plain import PlainWorker, plain_address, split_address
from sollold.machine.speed import cores
from sollold.places import Places
from sollold.turns import Turns

log = logging.getLogger("sollold.agent")

MEASURE_SECONDS = 5.0
_TELL_SECONDS = 3.0
_NEAR = 1
"""Interfaces of this rank or a better one lead to the LAN, not into a VPN or to containers."""
_FRESH_SECONDS = 0.3
"""A measurement not older than this is good enough to grant on."""
_PATIENCE_SECONDS = 4.0
"""A measurement that takes longer hangs (in a driver, say): nothing is granted on it."""
_PROTOCOL_SECONDS = 30.0
"""Until a worker of our own is asked again what protocol it speaks."""
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
        self._digests: dict[str, str] = {}
        self.cached: tuple[tuple[str, int], ...] = ()
        """For the record: models of which tensors are kept here."""
        self._workers: dict[str, Worker] = {}
        self._starting: dict[str, asyncio.Task[Done]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._checked: set[str] = set()
        """Deployments whose plain workers were found free when they took them."""
        self._telling: set[asyncio.Task[None]] = set()
        self._term_file = TermFile(places.state)
        self._measured_at = float("-inf")
        self._measured = Measurement((), {})
        self._allocated: dict[str, dict[str, int]] = {}
        self._complained = False
        self._measuring: asyncio.Task[None] | None = None
        self.others: Callable[[], Mapping[str, int]] = dict
        """Device → bytes that an Ollama on this machine has loaded."""
        self.ledger = Ledger(node_limit=settings.node.memory_limit)
        self.plain = PlainWorkers(
            settings.llama.rpc_backends,
            settings.llama.allow_plain_workers,
            settings.node.device_limits,
            held=self._plain_held,
            changed=self._plain_changed,
        )
        self._plain_watch: asyncio.Task[None] | None = None
        self._scanning: asyncio.Task[tuple[PlainWorker, ...]] | None = None
        self._protocols: dict[Llama, Version] = {}

    async def start(self) -> None:
        """Read the newest term, end what an earlier run left behind, measure; then grants are given."""
        self.ledger.term = await asyncio.to_thread(self._term_file.read)
        await asyncio.to_thread(self._journal.clear_up)
        await asyncio.to_thread(self._cache.clear_up)
        if self._settings.llama.worker_cache:
            self.cached = await asyncio.to_thread(self._cache.models)
        await self.measure()
        self._apply(self.ledger.reconciled())
        if self.plain:
            self._plain_watch = asyncio.create_task(self.plain.run(), name="plain workers")

    async def use(self, llama: Llama) -> None:
        """A llama.cpp is there: learn what protocol workers that others started must speak."""
        while self.plain:
            if (version := await self._protocol(llama)) is not None:
                self.plain.use(version)
                return
            await asyncio.sleep(_PROTOCOL_SECONDS)

    async def scan(self) -> tuple[PlainWorker, ...]:
        """Workers that others started on the networks of this machine; takes some seconds."""
        if self._scanning is None or self._scanning.done():
            self._scanning = asyncio.create_task(self._scan(), name="scan")
        return await asyncio.shield(self._scanning)

    async def _scan(self) -> tuple[PlainWorker, ...]:
        found = await asyncio.to_thread(interfaces, self._settings.cluster.interfaces)
        near = [address for one in found if one.rank <= _NEAR for address in one.ipv4]
        llama = self._llama()
        ours = await self._protocol(llama) if llama is not None else None
        return await scan(hosts_beside(near), PORTS, ours, self._plain_held())

    async def _protocol(self, llama: Llama) -> Version | None:
        if llama not in self._protocols:
            logs = self._places.state / "logs"
            version = await own_protocol(llama, self._ports, self._journal, logs)
            if version is None:
                return None
            self._protocols = {llama: version}
        return self._protocols[llama]

    async def run(self) -> None:
        """Expire and measure, until cancelled: also when the system has no file or thread left for it.

        Two tasks: a measurement that hangs stops no expiry.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._expire())
            group.create_task(self._keep_measuring())

    async def _expire(self) -> None:
        turns = Turns("the expiry of grants", log)
        while True:
            deadline = self.ledger.next_deadline()
            wait = MEASURE_SECONDS if deadline is None else min(deadline - time.monotonic(), MEASURE_SECONDS)
            await asyncio.sleep(max(wait, 0.05))
            with turns:
                self._apply(self.ledger.expire(time.monotonic()))

    async def _keep_measuring(self) -> None:
        turns = Turns("the measurement of memory", log)
        while True:
            await asyncio.sleep(max(1.0, self._measured_at + MEASURE_SECONDS - time.monotonic()))
            if time.monotonic() - self._measured_at >= MEASURE_SECONDS - 0.1:
                with turns:
                    await self.measure()

    async def close(self) -> None:
        """End every worker."""
        looking = [task for task in (self._plain_watch, self._scanning) if task is not None]
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)
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

    def worker_address(self, caller: str, deployment: str, plain: str = "") -> tuple[str, int]:
        """Host and port of a worker of ``deployment``, for its head alone.

        ``plain``: the address of one that others started; empty: the one that runs here for it.

        Raises:
            LookupError: there is none, or ``caller`` is not its head; the sentence says which.
        """
        worker = self._workers.get(deployment)
        granted = {plain_address(device) for device in self.ledger.bytes_of(deployment)}
        there = plain in granted and deployment in self._checked if plain else worker is not None
        if not there or not self.ledger.live(deployment):
            raise LookupError(f"no worker {plain or 'runs'} here for deployment {deployment}")
        if not any(one.head == caller for one in self.ledger.grants() if one.deployment == deployment):
            raise LookupError(f"{caller} is not the head of deployment {deployment}")
        if plain:
            return split_address(plain)
        assert worker is not None
        return LOOPBACK, worker.port

    # Commands

    async def reserve(self, caller: str, request: Reserve) -> Reserved:
        """See `Ledger.reserve`; measured first."""
        if time.monotonic() - self._measured_at <= _FRESH_SECONDS:
            self._offer()
        elif not await self.measure():
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
        if not done.ok or self._has_workers(request):
            return done
        start = self._starting.get(request.deployment)
        if start is None:
            start = asyncio.create_task(self._start_workers(request, llama))
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
                digest = self._digests.get(request.deployment, "")
                await asyncio.to_thread(self._cache.keep, request.deployment, digest)
                cached = await asyncio.to_thread(self._cache.models)
                if cached != self.cached:
                    self.cached = cached
                    self._changed()
            return replace(done, work=worker.process.work() if worker is not None else 0)
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
            self._digests.pop(deployment, None)
            await asyncio.to_thread(self._cache.close, deployment)
            await asyncio.to_thread(prune, self._places.state / "logs", self.ledger.deployments())
        finally:
            self._checked.discard(deployment)
            # What the dead processes held is free now; the next grant measures it.
            self._measured_at = float("-inf")
            self._ending.pop(deployment, None)
            self._apply(self.ledger.ended(deployment))

    def _has_workers(self, request: Commit) -> bool:
        own = not request.devices or request.deployment in self._workers
        return own and (request.deployment in self._checked or not self._plain_of(request.deployment))

    async def _start_workers(self, request: Commit, llama: Llama) -> Done:
        """The worker of our own, and a last look at those that others started: from now on they are taken."""
        deployment = request.deployment
        if deployment not in self._checked:
            for address in self._plain_of(deployment):
                if reason := await self.plain.check(address):
                    self._apply(self.ledger.end(deployment, reason))
                    return Done(False, reason)
            self._checked.add(deployment)
        if not request.devices or deployment in self._workers:
            return Done(True)
        return await self._start_worker(request, llama)

    async def _start_worker(self, request: Commit, llama: Llama) -> Done:
        deployment = request.deployment
        cache: Path | None = None
        if self._settings.llama.worker_cache and request.head != self._node:
            granted = self.ledger.bytes_of(deployment)
            size = sum(granted.get(device, 0) for device in request.devices)
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
        self._digests[deployment] = request.digest
        worker.process.exited.add_done_callback(lambda exited: self._worker_exited(deployment, worker))
        return Done(True)

    def _worker_exited(self, deployment: str, worker: Worker) -> None:
        if self._workers.get(deployment) is worker and self.ledger.live(deployment):
            code = worker.process.exited.result()
            why = last_words(code, worker.process.last_lines())
            log.warning("the worker of %s is gone: %s", deployment, why, extra={"deployment": deployment})
            head = next(one.head for one in self.ledger.grants() if one.deployment == deployment)
            lost = Lost(deployment, f"a worker is gone: {why}", crashed(code))
            telling = asyncio.create_task(self._tell(head, lost))
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
        self._measured, self._allocated = await asyncio.to_thread(self._look, processes)
        self._measured_at = time.monotonic()
        self._offer()

    def _offer(self) -> None:
        """Tell the ledger of the devices, as last measured."""
        devices = (*self._measured.devices, *self.plain.devices())
        # The system counts mapped weights as free, and would take them from under whoever computes with them.
        taken = {PROCESSOR: min(self.others().get(PROCESSOR, 0), self._measured.mapped)}
        self._apply(self.ledger.measured(devices, self._allocated, self._machine.reserves(), taken))

    def _plain_changed(self) -> None:
        self._offer()
        self._changed()

    def _plain_held(self) -> frozenset[str]:
        return frozenset(plain_address(grant.device) for grant in self.ledger.grants()) - {""}

    def _plain_of(self, deployment: str) -> tuple[str, ...]:
        """The workers that others started among what a deployment has here."""
        return tuple(sorted({plain_address(device) for device in self.ledger.bytes_of(deployment)} - {""}))

    def _look(self, processes: dict[str, list[Process]]) -> tuple[Measurement, dict[str, dict[str, int]]]:
        """The devices, and what each deployment has allocated by now. Blocks."""
        measurement = self._machine.measure()
        allocated: dict[str, dict[str, int]] = {}
        for deployment, running in processes.items():
            sizes = allocated.setdefault(deployment, {})
            for process in running:
                sizes[PROCESSOR] = sizes.get(PROCESSOR, 0) + process.memory()
                for device, size in measurement.processes.get(process.pid, {}).items():
                    sizes[device] = sizes.get(device, 0) + size
        return measurement, allocated

    def _processes(self) -> list[tuple[str, list[Process]]]:
        found = []
        for deployment in {grant.deployment for grant in self.ledger.grants()}:
            worker = self._workers.get(deployment)
            both = (worker.process if worker else None, self._head_process(deployment))
            found.append((deployment, [one for one in both if one is not None]))
        return found
