"""Has models loaded: the leader decides, the head loads, and callers here wait, sharing one load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec

from sollold.agent.deployments import Deployments
from sollold.cluster.gossip.record import Endpoint, Record, State
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, endpoint_at, name_of, next_change
from sollold.errors import Fault, Refusal, unloaded_by_force
from sollold.facts import dataclass
from sollold.leader.client import LeaderClient
from sollold.leader.messages import Drop, Ensure, Ensured, Verdict
from sollold.leader.snapshot import is_loading, loaded_of
from sollold.serving.candidate import EndpointQuery
from sollold.serving.request import Engine, Waiting
from sollold.tasks import cancel_and_wait
from sollold.undecodable import UNDECODABLE
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

_PLAN_SECONDS = 0.2
_SILENCE_SECONDS = 15.0
"""Timeout for the next line from a loading head, in seconds; it sends one at least every five."""
_MAX_FAILURES = 4
"""Failed deployments after which a load is given up."""


@dataclass(frozen=True, slots=True)
class Need:
    """A caller's need for a loaded model.

    Attributes:
        ask: the request to the leader.
        limit: maximum time to wait, in seconds.
        begun: it is for an answer already in progress: a full queue does not refuse it, and ``limit`` starts
            again whenever the load makes progress.
        waited: seconds already waited before.
    """

    ask: Ensure
    limit: float
    begun: bool = False
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Ready:
    """An endpoint that is ready, although its record may not have arrived here yet.

    ``reasons``: the leader's explanations of its decision, one sentence each.
    """

    node: str
    endpoint: Endpoint
    reasons: tuple[str, ...] = ()


def ensure_of(query: EndpointQuery, keep_alive: float | None) -> Ensure:
    """The request to the leader when nothing serves ``query``; ``keep_alive``: as set by the caller."""
    return Ensure(
        model=query.model,
        digest=query.digest,
        context=query.context,
        keep_alive=keep_alive,
        embedding=query.embedding,
        llama=Engine.LLAMA in query.engines,
        ollama=Engine.OLLAMA in query.engines,
        in_ollama=query.in_ollama,
        placement=query.placement,
    )


def with_ready(records: tuple[Record, ...], ready: Ready) -> tuple[Record, ...]:
    """The records as they will be once that of ``ready``'s node is up to date."""
    node, endpoint = ready.node, ready.endpoint
    return tuple(_with_endpoint(record, endpoint) if record.node == node else record for record in records)


def _with_endpoint(record: Record, endpoint: Endpoint) -> Record:
    others = tuple(e for e in record.endpoints if e.id != endpoint.id)
    return replace(record, endpoints=(*others, endpoint))


class _Load:
    """One load in progress, and the callers that wait for it."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Waiting], None]] = []
        self.last = Waiting("planning")
        self.task: asyncio.Task[Ready | None] | None = None

    def tell(self, waiting: Waiting) -> None:
        if waiting != self.last:
            self.last = waiting
            for listener in tuple(self.listeners):
                listener(waiting)


class Loader:
    """Has endpoints created by the cluster's leader."""

    def __init__(
        self, view: View, calls: RpcClient, queue: int = 512, own: Deployments | None = None
    ) -> None:
        """``queue``: maximum callers waiting here per model; ``own``: deployments with this node as head."""
        self._own = own
        self._view = view
        self._queue = max(1, queue)
        self._calls = calls
        self._leader = LeaderClient(view, calls)
        self._loads: dict[Ensure, _Load] = {}

    async def close(self) -> None:
        """End all waiting."""
        await cancel_and_wait(*(load.task for load in self._loads.values()))

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> Ready | None:
        """Wait until an endpoint should be READY. Callers with equal ``ask`` share one load.

        Returns None if the endpoint named by the leader is not in the records here yet.

        Raises:
            Refusal: TOO_BIG, NOT_FOUND, UNAVAILABLE (after ``limit``, or with no leader), ENGINE.
        """
        ask = need.ask
        if not need.begun:
            self._check_room(ask.model)
        load = self._loads.get(ask)
        if load is None or load.task is None:
            load = self._loads[ask] = _Load()
            load.task = asyncio.create_task(self._load(ask, load), name=f"load {ask.model}")
        task = load.task
        loop = asyncio.get_running_loop()
        deadline = asyncio.timeout(max(0.0, need.limit))
        furthest = load.last.progress

        def on_progress(waiting: Waiting) -> None:
            nonlocal furthest
            if need.begun and waiting.progress > furthest and not deadline.expired():
                furthest = waiting.progress
                deadline.reschedule(loop.time() + need.limit)
            on_wait(waiting)

        load.listeners.append(on_progress)
        on_wait(load.last)
        try:
            async with deadline:
                return await asyncio.shield(task)
        except TimeoutError:
            raise _too_long(ask.model, need.waited + need.limit, load.last) from None
        except asyncio.CancelledError:
            if task.cancelled():
                raise Refusal(
                    Fault.UNAVAILABLE, "this node is stopping; use another node", retry_after=1.0
                ) from None
            raise
        finally:
            load.listeners.remove(on_progress)
            if task.done() or not load.listeners:
                if self._loads.get(ask) is load:
                    del self._loads[ask]
                if not task.done():
                    await cancel_and_wait(task)

    def _check_room(self, model: str) -> None:
        """Check that one more caller may wait for ``model``.

        Raises:
            Refusal: UNAVAILABLE.
        """
        loads = [load for ask, load in self._loads.items() if ask.model == model]
        waiting = sum(len(load.listeners) for load in loads)
        if waiting >= self._queue:
            retry = min(_retry(60.0, load.last) for load in loads)
            raise Refusal(
                Fault.UNAVAILABLE,
                f"{waiting} requests already wait for model {model!r} to load; try again later",
                retry_after=retry,
            )

    async def unload(self, query: EndpointQuery, reason: str) -> None:
        """Have the leader end the model's deployments that are not in use.

        Raises:
            Refusal: UNAVAILABLE.
        """
        seen = loaded_of(self._view.live(), query.model, query.model)
        answer = await self._leader.unload(Drop(query.model, reason=reason, seen=seen))
        for deployment, refusal in answer.refused:
            log.info("not unloaded: %s", refusal, extra={"deployment": deployment})

    async def _load(self, ask: Ensure, load: _Load) -> Ready | None:
        failures = 0
        while True:
            answer = await self._leader.ensure(
                ask, lambda message: load.tell(Waiting("planning", message=message))
            )
            if answer.verdict is Verdict.USE:
                return self._ready_endpoint(answer)
            ended = await self._watch(answer.node, answer.deployment, load)
            if ended is not None and ended.state is State.READY:
                return Ready(answer.node, ended, answer.reasons)
            if ended is not None and ended.forced:
                raise unloaded_by_force(ask.model)
            if ended is not None and ended.state is State.FAILED:
                failures += 1
                if failures >= _MAX_FAILURES:
                    raise Refusal(
                        Fault.ENGINE,
                        f"model {ask.model!r} could not be loaded: {ended.reason}",
                        status=500,
                        retry_after=30.0,
                    )
                load.tell(Waiting("planning", message=ended.reason))
            await asyncio.sleep(_PLAN_SECONDS)

    def _ready_endpoint(self, answer: Ensured) -> Ready | None:
        endpoint = endpoint_at(self._view, answer.node, answer.deployment)
        if endpoint is None:
            return None
        return Ready(answer.node, replace(endpoint, state=State.READY), answer.reasons)

    async def _watch(self, node: str, deployment: str, load: _Load) -> Endpoint | None:
        """Wait until a deployment has finished loading; None if it or its head is gone.

        The head is asked, since its record arrives with a delay; the record is watched too, since the head
        may die.
        """
        asking = asyncio.create_task(self._ask_head(node, deployment, load))
        reported: Endpoint | None = None
        try:
            while True:
                await self._await_change(asking)
                if asking.done() and reported is None:
                    reported = asking.result()
                    if reported is not None and not is_loading(reported):
                        return reported
                if all(record.node != node for record in self._view.live()):
                    return None
                recorded = endpoint_at(self._view, node, deployment)
                if recorded is not None:
                    load.tell(_waiting(recorded))
                    if not is_loading(recorded):
                        return recorded
                elif asking.done():
                    return None
        finally:
            await cancel_and_wait(asking)

    async def _await_change(self, asking: asyncio.Task[Endpoint | None]) -> None:
        """Wait for a change of the view or the head's answer, two seconds at most."""
        changed = asyncio.create_task(next_change(self._view, 2.0))
        waited: set[asyncio.Task[Any]] = {changed} if asking.done() else {changed, asking}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _ask_head(self, node: str, deployment: str, load: _Load) -> Endpoint | None:
        """Follow the head's own report of the load. Return its last state; None if there was no report."""
        last: Endpoint | None = None
        try:
            if self._own is not None and node == self._view.me.node:
                report = self._own.loading(deployment)
            else:
                report = self._head_report(node, deployment)
            async for last in report:
                load.tell(_waiting(last))
        except (
            PeerError,
            aiohttp.ClientError,
            OSError,
            TimeoutError,
            ValueError,
            *UNDECODABLE,
        ) as error:
            head = name_of(self._view, node)
            log.debug("lost contact with the head %s: %s", head, error, extra={"deployment": deployment})
        return last

    async def _head_report(self, node: str, deployment: str) -> AsyncIterator[Endpoint]:
        path = f"/deployments/{deployment}/wait"
        async with self._calls.stream(node, "GET", path, idle_timeout=_SILENCE_SECONDS) as response:
            while response.status == 200 and (line := await response.content.readline()):
                yield msgspec.json.decode(line, type=Endpoint)


def _waiting(endpoint: Endpoint) -> Waiting:
    return Waiting("loading", progress=endpoint.progress, message=endpoint.reason)


def _too_long(model: str, waited: float, last: Waiting) -> Refusal:
    progress = f"loading, {last.progress:.0%} done" if last.stage == "loading" else last.stage
    message = f"model {model!r} was not ready after {seconds_text(waited)}: {progress}"
    if last.message:
        message += f" ({last.message})"
    message += ". Loading continues; try again later" if last.stage == "loading" else ". Try again later"
    return Refusal(Fault.UNAVAILABLE, message, retry_after=_retry(waited, last))


def _retry(seconds: float, last: Waiting) -> float:
    """Estimate the seconds until the load is done, given that it has taken ``seconds`` so far."""
    rest = seconds * (1 - last.progress) / last.progress if last.progress > 0.02 else 30.0
    return min(max(5.0, rest), 600.0)
