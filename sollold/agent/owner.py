"""This node as the owner of its memory: the ledger's shell. It starts and ends the workers of grants."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.agent.commands import Commit, Done, Lost, Release, Renew, Reserve, Reserved
from sollold.agent.journal import Journal
from sollold.agent.last_words import crashed, last_words
from sollold.agent.ledger import Action, KillWorker, Ledger, PersistTerm
from sollold.agent.llama_find import Llama
from sollold.agent.ports import Ports
from sollold.agent.process import Process
from sollold.agent.tensor_cache import TensorCache
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
        self._measured_at = float("-inf")
        self._measuring: asyncio.Task[None] | None = None
        self.ledger = Ledger(node_limit=settings.node.memory_limit)

    @property
    def _term_file(self) -> Path:
        return self._places.state / "term.json"

    async def start(self) -> None:
        """Read the newest term, end what an earlier run left behind, measure; then grants are given."""
        self.ledger.term = await asyncio.to_thread(_read_term, self._term_file)
        await asyncio.to_thread(self._journal.clear_up)
        await asyncio.to_thread(self._cache.clear_up)
        await self.measure()
        self._apply(self.ledger.reconciled())

    async def run(self) -> None:
        """Expire and measure, until cancelled."""
        while True:
            deadline = self.ledger.next_deadline()
            wait = MEASURE_SECONDS if deadline is None else min(deadline - time.monotonic(), MEASURE_SECONDS)
            await asyncio.sleep(max(wait, 0.05))
            self._apply(self.ledger.expire(time.monotonic()))
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
            await asyncio.gather(self._measuring, return_exceptions=True)

    async def measure(self) -> None:
        """Measure the devices now, or share in a measurement that is under way."""
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(self._measure())
        await asyncio.shield(self._measuring)

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
        if time.monotonic() - self._measured_at > _FRESH_SECONDS:
            await self.measure()
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
        await self._carry_out(actions)
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
        await self._carry_out(actions)
        if done.ok and request.loaded:
            worker = self._workers.get(request.deployment)
            if worker is not None:
                await asyncio.to_thread(self._cache.keep, request.deployment)
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
        """Do what the ledger wants before an answer goes out. What went wrong, or empty."""
        self._apply(actions)
        for action in actions:
            if isinstance(action, PersistTerm):
                try:
                    await asyncio.to_thread(_write_term, self._term_file, action.term)
                except OSError as error:
                    return f"the term can't be written to {self._term_file}: {error}"
        return ""

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


def _read_term(file: Path) -> Term:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Term)
    except FileNotFoundError:
        return Term()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("the newest term can't be read from %s: %s", file, error)
        return Term()


def _write_term(file: Path, term: Term) -> None:
    """Written whole or not at all, and on the disk when this returns."""
    fresh = file.with_suffix(".new")
    with fresh.open("wb") as out:
        out.write(msgspec.json.encode(term))
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(file)
