"""Getting a model loaded: the leader decides, the head loads, callers here wait, one load for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import aiohttp
import msgspec

from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.record import Endpoint, Record, State
from sollold.cluster.view import View
from sollold.leader.ensure import Drop, Dropped, Ensure, Ensured, Verdict
from sollold.leader.world import loaded_of
from sollold.serving.ask import Engine, Fault, Refusal, Waiting
from sollold.serving.router import Wish
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

_ASK = 60.0
"""Seconds that the leader may take: it asks every owner in turn."""
_AGAIN = 0.5
_PLANNING = 0.2
_SILENCE = 15.0
"""Seconds without a line from a head that loads; it sends one every five."""
_UNANSWERED = 20
"""Times that a leader may be there and yet fail to answer."""
_FAILURES = 4
"""Deployments that may fail one after the other before the callers are told."""


@dataclass(frozen=True, slots=True)
class Need:
    """A model that must answer soon.

    ``keep_alive``: as the caller named it; ``limit``: seconds to wait; ``begun``: for an answer that is under
    way already: no full line sends it away, and it waits on while the load goes forward, for so long without
    progress; ``waited``: seconds that were waited before.
    """

    wish: Wish
    keep_alive: float | None
    limit: float
    begun: bool = False
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Ready:
    """An endpoint that answers now, though the record that says so may still be on its way here."""

    node: str
    endpoint: Endpoint


class Loader(Protocol):
    """Gets endpoints made."""

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> Ready | None:
        """Wait until an endpoint for it should be READY. However many wait, it is loaded once.

        Raises:
            Refusal: TOO_BIG, NOT_FOUND, UNAVAILABLE (after ``limit``, or with no leader), ENGINE.
        """
        ...

    async def drop(self, wish: Wish, reason: str) -> None:
        """Have the deployments of the model ended that are not in use.

        Raises:
            Refusal: UNAVAILABLE.
        """
        ...


def with_ready(records: tuple[Record, ...], ready: Ready | None) -> tuple[Record, ...]:
    """The records as they will be when the news of ``ready`` has come."""
    if ready is None:
        return records
    return tuple(_told(record, ready.endpoint) if record.node == ready.node else record for record in records)


def _told(record: Record, endpoint: Endpoint) -> Record:
    others = tuple(other for other in record.endpoints if other.id != endpoint.id)
    return replace(record, endpoints=(*others, endpoint))


class _Load:
    """One model being loaded, and the callers that wait for it."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Waiting], None]] = []
        self.last = Waiting("planning")
        self.task: asyncio.Task[Ready | None] | None = None

    def tell(self, waiting: Waiting) -> None:
        if waiting != self.last:
            self.last = waiting
            for listener in tuple(self.listeners):
                listener(waiting)


class LeaderLoader:
    """`Loader` over the cluster's leader."""

    def __init__(self, view: View, calls: PeerCalls, queue: int = 512) -> None:
        """``queue``: callers of a model that may wait for it here."""
        self._view = view
        self._queue = max(1, queue)
        self._calls = calls
        self._loads: dict[tuple[Wish, float | None], _Load] = {}

    async def close(self) -> None:
        """End all waiting."""
        tasks = [load.task for load in self._loads.values() if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> Ready | None:
        """As `Loader.ready`."""
        wish = replace(need.wish, prefix="", told=("", ""))
        key = (wish, need.keep_alive)
        if not need.begun:
            self._check_room(wish.model)
        load = self._loads.get(key)
        if load is None or load.task is None:
            load = self._loads[key] = _Load()
            load.task = asyncio.create_task(
                self._load(wish, need.keep_alive, load), name=f"load {wish.model}"
            )
        task = load.task
        loop = asyncio.get_running_loop()
        patience = asyncio.timeout(max(0.0, need.limit))
        furthest = load.last.progress

        def told(waiting: Waiting) -> None:
            nonlocal furthest
            if need.begun and waiting.progress > furthest and not patience.expired():
                furthest = waiting.progress
                patience.reschedule(loop.time() + need.limit)
            on_wait(waiting)

        load.listeners.append(told)
        on_wait(load.last)
        try:
            async with patience:
                return await asyncio.shield(task)
        except TimeoutError:
            raise _too_long(wish, need.waited + need.limit, load.last) from None
        except asyncio.CancelledError:
            if task.cancelled():
                raise Refusal(
                    Fault.UNAVAILABLE, "this node is stopping; ask another", retry_after=1.0
                ) from None
            raise
        finally:
            load.listeners.remove(told)
            if task.done() or not load.listeners:
                if self._loads.get(key) is load:
                    del self._loads[key]
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    def _check_room(self, model: str) -> None:
        """Refuse one more who waits for ``model``, when there is no room.

        Raises:
            Refusal: UNAVAILABLE.
        """
        loads = [load for (wish, _), load in self._loads.items() if wish.model == model]
        waiting = sum(len(load.listeners) for load in loads)
        if waiting >= self._queue:
            retry = min(_retry(60.0, load.last) for load in loads)
            raise Refusal(
                Fault.UNAVAILABLE,
                f"{waiting} requests wait for model {model!r} to load already; try again later",
                retry_after=retry,
            )

    async def drop(self, wish: Wish, reason: str) -> None:
        """As `Loader.drop`."""
        seen = loaded_of(self._view.live(), wish.model, wish.model, wish.digest)
        request = Drop(wish.model, wish.digest, reason=reason, seen=seen)
        leader = self._view.leader().leader
        for _ in range(3):
            if not leader:
                break
            try:
                answer = await self._calls.call(leader, "drop", request, Dropped, timeout=_ASK)
            except PeerError as error:
                raise Refusal(
                    Fault.UNAVAILABLE, f"the leader could not be asked: {error}", retry_after=2.0
                ) from None
            if not answer.leader or answer.leader == leader:
                for deployment, why in answer.refused:
                    log.info("not unloaded: %s", why, extra={"deployment": deployment})
                return
            leader = answer.leader
        raise Refusal(Fault.UNAVAILABLE, "the cluster has no leader just now; try again", retry_after=2.0)

    async def _load(self, wish: Wish, keep_alive: float | None, load: _Load) -> Ready | None:
        request = Ensure(
            model=wish.model,
            digest=wish.digest,
            context=wish.context,
            keep_alive=keep_alive,
            embedding=wish.embedding,
            llama=Engine.LLAMA in wish.engines,
            ollama=Engine.OLLAMA in wish.engines,
            in_ollama=wish.in_ollama,
        )
        failures = unanswered = 0
        named = ""
        while True:
            leader = named or self._view.leader().leader
            named = ""
            if not leader:
                load.tell(Waiting("planning", message="the cluster has no leader just now"))
                await self._change(_AGAIN)
                continue
            try:
                answer = await self._calls.call(leader, "ensure", request, Ensured, timeout=_ASK)
            except PeerError as error:
                said = f"the leader could not be asked: {error}"
                if load.last.message != said:
                    log.warning("%s (%s)", said, leader)
                load.tell(Waiting("planning", message=said))
                unanswered = 0 if error.transport else unanswered + 1
                if unanswered >= _UNANSWERED:
                    raise Refusal(Fault.UNAVAILABLE, said, retry_after=10.0) from None
                await self._change(_AGAIN)
                continue
            unanswered = 0
            if answer.verdict is Verdict.USE:
                return self._known(answer.node, answer.deployment)
            if answer.verdict is Verdict.WAIT:
                ended = await self._watch(answer.node, answer.deployment, load)
                if ended is not None and ended.state is State.READY:
                    return Ready(answer.node, ended)
                if ended is not None and ended.state is State.FAILED:
                    failures += 1
                    if failures >= _FAILURES:
                        raise Refusal(
                            Fault.ENGINE,
                            f"model {wish.model!r} could not be loaded: {ended.reason}",
                            status=500,
                            retry_after=30.0,
                        )
                    load.tell(Waiting("planning", message=ended.reason))
                await asyncio.sleep(_PLANNING)
            elif answer.verdict is Verdict.PLANNING:
                load.tell(Waiting("planning", message=answer.message))
                await asyncio.sleep(_PLANNING)
            elif answer.verdict is Verdict.REFUSED:
                raise Refusal(_fault(answer.fault), answer.message, retry_after=answer.retry_after)
            else:
                # A node that has not heard yet may name one that is dead.
                there = {record.node for record in self._view.live()}
                if answer.leader != leader and answer.leader in there:
                    named = answer.leader
                await self._change(_PLANNING if named else _AGAIN)

    def _known(self, node: str, deployment: str) -> Ready | None:
        record = self._view.record(node)
        for endpoint in record.endpoints if record is not None else ():
            if endpoint.id == deployment:
                return Ready(node, replace(endpoint, state=State.READY))
        return None

    async def _watch(self, node: str, deployment: str, load: _Load) -> Endpoint | None:
        """Wait for a deployment's end of loading; None when it or its head is gone.

        The head is asked, since its record takes a moment to come; the record too, since the head may have
        died.
        """
        asking = asyncio.create_task(self._ask_head(node, deployment, load))
        asked: Endpoint | None = None
        try:
            while True:
                changed = asyncio.create_task(self._change(2.0))
                waited = {changed} if asking.done() else {changed, asking}
                try:
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if asking.done() and asked is None:
                    asked = asking.result()
                    if asked is not None and asked.state not in (State.STARTING, State.LOADING):
                        return asked
                if all(record.node != node for record in self._view.live()):
                    return None
                record = self._view.record(node)
                found = [e for e in record.endpoints if e.id == deployment] if record is not None else []
                if found:
                    load.tell(_waiting(found[0]))
                    if found[0].state not in (State.STARTING, State.LOADING):
                        return found[0]
                elif asking.done():
                    return None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_head(self, node: str, deployment: str, load: _Load) -> Endpoint | None:
        """The head's own account, a line at every change. None when it knows nothing, or broke off."""
        last: Endpoint | None = None
        try:
            path = f"/deployments/{deployment}/wait"
            async with self._calls.stream(node, "GET", path, idle_timeout=_SILENCE) as response:
                if response.status != 200:
                    return None
                while line := await response.content.readline():
                    last = msgspec.json.decode(line, type=Endpoint)
                    load.tell(_waiting(last))
        except (
            PeerError,
            aiohttp.ClientError,
            OSError,
            TimeoutError,
            ValueError,
            msgspec.MsgspecError,
        ) as error:
            log.debug("the head %s broke off: %s", node, error, extra={"deployment": deployment})
        return last

    async def _change(self, limit: float) -> None:
        """Wait for a change of the view, ``limit`` seconds at the most."""
        changed = asyncio.Event()
        undo = self._view.subscribe(changed.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), limit)
        finally:
            undo()


def _waiting(endpoint: Endpoint) -> Waiting:
    return Waiting("loading", progress=endpoint.progress, message=endpoint.reason)


def _fault(word: str) -> Fault:
    try:
        return Fault(word)
    except ValueError:
        return Fault.UNAVAILABLE


def _too_long(wish: Wish, waited: float, last: Waiting) -> Refusal:
    how_far = f"loading, {last.progress:.0%} done" if last.stage == "loading" else last.stage
    message = f"model {wish.model!r} was not ready after {seconds_text(waited)}: {how_far}"
    if last.message:
        message += f" ({last.message})"
    message += ". Loading goes on; ask again"
    return Refusal(Fault.UNAVAILABLE, message, retry_after=_retry(waited, last))


def _retry(took: float, last: Waiting) -> float:
    """Seconds after which the load should be done, when it has taken so many to get where it is."""
    rest = took * (1 - last.progress) / last.progress if last.progress > 0.02 else 30.0
    return min(max(5.0, rest), 600.0)
