"""The deployments whose head is this node: their use by serving, their part of the record, and their end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from sollold.cluster.gossip.record import Endpoint, State
from sollold.cluster.net.view import View, next_change
from sollold.engines.address import EngineAddress
from sollold.engines.commands import Done
from sollold.engines.llamacpp.deployment import Deployment
from sollold.engines.llamacpp.participants import Work
from sollold.engines.llamacpp.process import Process

log = logging.getLogger("sollold.agent")

FAILED_SECONDS = 60.0
"""How long a failed deployment stays in the record, so that waiting clients see why."""
_UNUSED_CHECKS, _CHECK_SECONDS = 15, 0.02
_REPORT_SECONDS = 5.0
"""Interval of reports about a loading deployment that does not change, in seconds."""


class Deployments:
    """Runs deployments and finds them by id.

    Args:
        drain_limit: seconds in which a deployment may finish its work when a participant drains.
        note: called when a deployment is added, changes state or is removed.
        changed: called on smaller changes.

    Attributes:
        all: the deployments by id.
        load_failed: called with the model's digest and the end of ``llama-server``'s log after a failure.
    """

    def __init__(
        self, view: View, drain_limit: float, *, note: Callable[[], None], changed: Callable[[], None]
    ) -> None:
        self.all: dict[str, Deployment] = {}
        self.load_failed: Callable[[str, str], Awaitable[None]] | None = None
        self._view = view
        self._node = view.me.node
        self._drain_limit = drain_limit
        self._note = note
        self._changed = changed
        self._running: dict[str, asyncio.Task[None]] = {}

    def add(self, deployment: Deployment) -> None:
        """Run a deployment until it ends."""
        self.all[deployment.id] = deployment
        self._running[deployment.id] = asyncio.create_task(self._run(deployment))
        self._note()

    async def close(self) -> None:
        """Stop all; the caller has drained the requests."""
        for deployment in self.all.values():
            deployment.end("the daemon is stopping", state=State.DRAINING)
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def address(self, deployment: str) -> EngineAddress | None:
        """Return the address of a READY deployment's ``llama-server``, or None."""
        entry = self.all.get(deployment)
        return entry.address if entry is not None and entry.state is State.READY else None

    @contextmanager
    def busy(self, deployment: str, keep_alive: float | None = None) -> Iterator[None]:
        """Count a request in the deployment, which prevents unloading it as idle.

        ``keep_alive``: as in the method of this name; None: unchanged.

        Raises:
            LookupError: it is not here, or not ready.
        """
        entry = self.all.get(deployment)
        if entry is None or entry.state is not State.READY:
            raise LookupError(f"deployment {deployment} is not ready on this node")
        if keep_alive is not None:
            entry.keep_alive = keep_alive
        entry.busy += 1
        entry.used()
        self._changed()
        try:
            yield
        finally:
            entry.busy -= 1
            entry.used()
            entry.end_if_due()
            self._changed()

    def report(self, deployment: str, active: int, waiting: int, speed: float) -> None:
        """Record the requests in the engine and in its queue, and the measured tokens per second of a single
        stream; 0.0: unknown."""
        entry = self.all.get(deployment)
        if entry is None:
            return
        if (entry.active, entry.waiting) != (active, waiting):
            entry.active, entry.waiting = active, waiting
            entry.used()
            self._changed()
        if speed > 0:
            entry.speed = speed
            self._changed()

    def answered(self, deployment: str, tokens: int, drafted: int, accepted: int) -> None:
        """Record a response of this many tokens, some of them drafted and accepted."""
        entry = self.all.get(deployment)
        if entry is not None and entry.drafts.by:
            entry.drafts = entry.drafts.with_answer(tokens, drafted, accepted)
            self._changed()

    def keep_alive(self, deployment: str, seconds: float) -> None:
        """Set how long it may be idle, as a client requested; negative: forever."""
        entry = self.all.get(deployment)
        if entry is not None and entry.keep_alive != seconds:
            entry.keep_alive = seconds
            self._changed()

    def fail(self, deployment: str, reason: str) -> None:
        """End a deployment as failed: it makes no progress, or produces nonsense."""
        entry = self.all.get(deployment)
        if entry is not None:
            entry.end(reason)

    def work(self, deployment: str) -> Work | None:
        """Return a deployment's work counters; None if unknown."""
        entry = self.all.get(deployment)
        return entry.work() if entry is not None else None

    def endpoint(self, deployment: str) -> Endpoint | None:
        """Return the endpoint of a deployment as the record has it, or is about to."""
        entry = self.all.get(deployment)
        return entry.endpoint() if entry is not None else None

    async def loading(self, deployment: str) -> AsyncIterator[Endpoint]:
        """Yield the endpoint while it loads: now, on changes and periodically, finally with the result."""
        entry = self.all.get(deployment)
        while entry is not None:
            endpoint = entry.endpoint()
            yield endpoint
            if endpoint.state not in (State.STARTING, State.LOADING):
                return
            await next_change(entry, _REPORT_SECONDS)

    async def unload(self, deployment: str, reason: str, *, force: bool = False) -> Done:
        """Unload one. Returns when all its memory is released."""
        entry = self.all.get(deployment)
        if entry is None:
            return Done(True)
        if not force and not await _is_unused(entry):
            return Done(False, f"{entry.plan.model} has running requests")
        if not force and entry.state in (State.STARTING, State.LOADING):
            return Done(False, f"{entry.plan.model} is being loaded for a waiting request")
        entry.end(reason, state=State.DRAINING, forced=force)
        task = self._running.get(deployment)
        if task is not None:
            await asyncio.shield(task)
        return Done(True)

    def check_participants(self) -> None:
        """End deployments that have lost a participant, even if their processes still run.

        Those with a draining participant accept no new work, and end once their running requests finish.
        """
        if not self.all:
            return
        live = {record.node: record for record in self._view.live()}
        for entry in self.all.values():
            if not entry.alive:
                continue
            others = [node for node in entry.participants if node != self._node]
            if gone := [node for node in others if node not in live]:
                entry.end(f"node {gone[0]} left the cluster; it held layers of this model", culprit=gone[0])
            elif leaving := [node for node in others if live[node].draining]:
                reason = f"node {live[leaving[0]].name} is draining; it holds layers of this model"
                entry.stop_accepting(reason, self._drain_limit)
                entry.end_if_due()
            else:
                entry.accept_again()

    def unload_idle(self) -> None:
        """Unload what has been idle for too long; forget old failures."""
        for entry in list(self.all.values()):
            entry.end_if_due()
            if entry.overdue():
                entry.end(f"idle for {entry.keep_alive:.0f} s", state=State.DRAINING)
            elif entry.ended_at and time.monotonic() - entry.ended_at > FAILED_SECONDS:
                del self.all[entry.id]
                self._note()

    async def end_head(self, deployment: str, reason: str) -> None:
        """Stop its ``llama-server`` if it runs, and then everything else."""
        entry = self.all.get(deployment)
        if entry is not None and deployment in self._running:
            entry.end(reason)
            await entry.head_gone()

    def head_process(self, deployment: str) -> Process | None:
        """Return the process of its ``llama-server``, if any."""
        entry = self.all.get(deployment)
        return entry.head.process if entry is not None and entry.head is not None else None

    async def _run(self, deployment: Deployment) -> None:
        try:
            await deployment.run()
        finally:
            self._running.pop(deployment.id, None)
            failed = deployment.state is State.FAILED
            log.log(
                logging.WARNING if failed else logging.INFO,
                "%s %s: %s",
                deployment.plan.model,
                "failed" if failed else "was unloaded",
                deployment.reason,
                extra={"deployment": deployment.id},
            )
            if not failed:
                self.all.pop(deployment.id, None)
            elif deployment.head is not None and self.load_failed is not None:
                lines = deployment.head.process.last_lines()
                await self.load_failed(deployment.plan.digest, "\n".join(lines))
            self._note()


async def _is_unused(deployment: Deployment) -> bool:
    """Return whether it has no requests. Waits briefly: an answered request still counts for a moment."""
    for _ in range(_UNUSED_CHECKS):
        if not deployment.in_use:
            return True
        await asyncio.sleep(_CHECK_SECONDS)
    return False
