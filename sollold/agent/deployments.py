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
from sollold.engines.llamacpp.deployment import Deployment, Work
from sollold.engines.llamacpp.process import Process

log = logging.getLogger("sollold.agent")

FAILED_SECONDS = 60.0
"""How long a failed deployment stays in the record, so that waiting clients see why."""
_LEAVING_LOOKS, _LEAVING_LOOK = 15, 0.02
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
        one = self.all.get(deployment)
        return one.address if one is not None and one.state is State.READY else None

    @contextmanager
    def busy(self, deployment: str, keep_alive: float | None = None) -> Iterator[None]:
        """Count a request in the deployment, which prevents unloading it as idle.

        ``keep_alive``: as in the method of this name; None: unchanged.

        Raises:
            LookupError: it is not here, or not ready.
        """
        one = self.all.get(deployment)
        if one is None or one.state is not State.READY:
            raise LookupError(f"deployment {deployment} is not ready on this node")
        if keep_alive is not None:
            one.keep_alive = keep_alive
        one.busy += 1
        one.used()
        self._changed()
        try:
            yield
        finally:
            one.busy -= 1
            one.used()
            one.end_if_due()
            self._changed()

    def report(self, deployment: str, active: int, waiting: int, speed: float) -> None:
        """Record the requests in the engine and in its queue, and the measured tokens per second of a single
        stream; 0.0: unknown."""
        one = self.all.get(deployment)
        if one is None:
            return
        if (one.active, one.waiting) != (active, waiting):
            one.active, one.waiting = active, waiting
            one.used()
            self._changed()
        if speed > 0:
            one.speed = speed
            self._changed()

    def answered(self, deployment: str, tokens: int, drafted: int, accepted: int) -> None:
        """Record a response of this many tokens, some of them drafted and accepted."""
        one = self.all.get(deployment)
        if one is not None and one.drafts.by:
            one.drafts = one.drafts.with_answer(tokens, drafted, accepted)
            self._changed()

    def keep_alive(self, deployment: str, seconds: float) -> None:
        """Set how long it may be idle, as a client requested; negative: forever."""
        one = self.all.get(deployment)
        if one is not None and one.keep_alive != seconds:
            one.keep_alive = seconds
            self._changed()

    def fail(self, deployment: str, reason: str) -> None:
        """End a deployment as failed: it makes no progress, or produces nonsense."""
        one = self.all.get(deployment)
        if one is not None:
            one.end(reason)

    def work(self, deployment: str) -> Work | None:
        """Return a deployment's work counters; None if unknown."""
        one = self.all.get(deployment)
        return one.work() if one is not None else None

    def endpoint(self, deployment: str) -> Endpoint | None:
        """Return the endpoint of a deployment as the record has it, or is about to."""
        one = self.all.get(deployment)
        return one.endpoint() if one is not None else None

    async def loading(self, deployment: str) -> AsyncIterator[Endpoint]:
        """Yield the endpoint while it loads: now, on changes and periodically, finally with the result."""
        one = self.all.get(deployment)
        while one is not None:
            endpoint = one.endpoint()
            yield endpoint
            if endpoint.state not in (State.STARTING, State.LOADING):
                return
            await next_change(one, _REPORT_SECONDS)

    async def unload(self, deployment: str, reason: str, *, force: bool = False) -> Done:
        """Unload one. Returns when all its memory is released."""
        one = self.all.get(deployment)
        if one is None:
            return Done(True)
        if not force and not await _is_unused(one):
            return Done(False, f"{one.plan.model} has running requests")
        if not force and one.state in (State.STARTING, State.LOADING):
            return Done(False, f"{one.plan.model} is being loaded for a waiting request")
        one.end(reason, state=State.DRAINING, forced=force)
        task = self._running.get(deployment)
        if task is not None:
            await asyncio.shield(task)
        return Done(True)

    def check_participants(self) -> None:
        """End deployments that have lost a participant, even if their processes still hang on.

        Those with a draining participant accept no new work, and end once their running requests finish.
        """
        if not self.all:
            return
        live = {record.node: record for record in self._view.live()}
        for one in self.all.values():
            if not one.alive:
                continue
            others = [node for node in one.participants if node != self._node]
            if gone := [node for node in others if node not in live]:
                one.end(f"node {gone[0]} left the cluster; it held layers of this model", culprit=gone[0])
            elif leaving := [node for node in others if live[node].draining]:
                reason = f"node {live[leaving[0]].name} is draining; it holds layers of this model"
                one.stop_accepting(reason, self._drain_limit)
                one.end_if_due()
            else:
                one.accept_again()

    def unload_idle(self) -> None:
        """Unload what has been idle for too long; forget old failures."""
        for one in list(self.all.values()):
            one.end_if_due()
            if one.overdue():
                one.end(f"idle for {one.keep_alive:.0f} s", state=State.DRAINING)
            elif one.ended_at and time.monotonic() - one.ended_at > FAILED_SECONDS:
                del self.all[one.id]
                self._note()

    async def end_head(self, deployment: str, reason: str) -> None:
        """Stop its ``llama-server`` if it runs, and then everything else."""
        one = self.all.get(deployment)
        if one is not None and deployment in self._running:
            one.end(reason)
            await one.head_gone()

    def head_process(self, deployment: str) -> Process | None:
        """Return the process of its ``llama-server``, if any."""
        one = self.all.get(deployment)
        return one.head.process if one is not None and one.head is not None else None

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


async def _is_unused(one: Deployment) -> bool:
    """Return whether no request is in it. One just answered takes a moment to leave, so wait briefly."""
    for _ in range(_LEAVING_LOOKS):
        if not (one.busy or one.active or one.waiting):
            return True
        await asyncio.sleep(_LEAVING_LOOK)
    return False
