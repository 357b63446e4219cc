"""The leader's shell: answers what nodes ask, and carries placements out, one after the other.

A node leads as long as the view says so; the same object asks the leader when another node is it. Nothing
here matters after a change of leader: the next one reads the records and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sollold.agent.commands import Fetch, Fetched
from sollold.cluster.peer import PeerCalls, PeerError, PeerServer
from sollold.cluster.record import State
from sollold.cluster.view import View
from sollold.config import Settings
from sollold.leader.backoff import Backoff
from sollold.leader.carry import UNLOAD_TIMEOUT, Carrier, StaleError
from sollold.leader.decide import Decision, FetchFirst, Place, Refuse, Soon, decide
from sollold.leader.ensure import Drop, Dropped, Ensure, Ensured, PlanPreview, Verdict
from sollold.leader.foresee import foresee
from sollold.leader.library import Library
from sollold.leader.lines import Lines
from sollold.leader.memory import Memory
from sollold.leader.preview import preview_of
from sollold.leader.reuse import Otherwise, Use, Wait, for_embedding
from sollold.leader.world import World, loaded_of, runs_on_llama, unloaded, with_refusals
from sollold.models.model import Model
from sollold.models.shape import Shape
from sollold.placement.profile import profile_of
from sollold.placement.speed import Correction, uncorrected
from sollold.serving.ask import Fault, unresolved

log = logging.getLogger("sollold.leader")

ANSWER_WITHIN = 20.0
"""Seconds after which a caller gets PLANNING rather than no answer."""
ATTEMPTS = 6
REPLICA_EVERY = 2.0
"""Seconds between two looks at the lines."""
SHAPE_PAUSES = (0.3, 1.0, 0.0)
"""Seconds between two attempts to have a header read: a node that holds it may be busy with a fault."""
FETCH_TIMEOUT = 5.0
FETCH_LOOK = 0.5
"""Seconds that a caller is held while a file is on its way."""
FETCH_AGAIN = 60.0
"""Seconds after which a node that could not get a file is thought of again."""
SOON = 1.0
"""Seconds that a caller is held while others' memory is being given back."""


_LOOKS, _LOOK = 30, 0.1
"""How often, and after how many seconds each, the leader looks again for a model that a caller knows."""


class Leader:
    """See the module's text. `register`, `start`, at the end `close`.

    Args:
        corrections: architecture → how much slower each device is than predicted.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        view: View,
        calls: PeerCalls,
        library: Library,
        corrections: Callable[[str], Correction] = lambda architecture: uncorrected,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._view = view
        self._calls = calls
        self._library = library
        self._corrections = corrections
        self._clock = clock
        self._memory = Memory(settings.serving.drain_limit)
        self._carrier = Carrier(view, calls, self._memory, clock)
        self._jobs: dict[Ensure, asyncio.Task[Ensured]] = {}
        self._turn = asyncio.Semaphore(1)
        """The line of placements: a second one is planned when the first has its bytes."""
        self._fetches = Backoff(free=0, first=FETCH_AGAIN)
        self._lines = Lines()
        self._watch: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._changed = asyncio.Event()

    def use(self, settings: Settings) -> None:
        """Other settings from the next placement on."""
        self._settings = settings

    def register(self, server: PeerServer) -> None:
        """Answer the peer calls ``ensure`` and ``drop``."""
        server.method("ensure", Ensure, self._on_ensure)
        server.method("drop", Drop, self._on_drop)

    async def start(self) -> None:
        """Begin to watch the records."""
        self._unsubscribe = self._view.subscribe(self._observe)
        self._observe()
        self._watch = asyncio.create_task(self._replicate(), name="replicas")
        self._watch.add_done_callback(_tell_fault)

    async def close(self) -> None:
        """End what is being placed; what was reserved expires by itself."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        jobs: list[asyncio.Task[Any]] = [*self._jobs.values(), *([self._watch] if self._watch else [])]
        self._watch = None
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    # For this node

    async def ensure(self, ask: Ensure, timeout: float = ANSWER_WITHIN + 10) -> Ensured:
        """Ask whoever leads. ELSEWHERE with an empty ``leader`` when nobody could be asked."""
        asked: set[str] = set()
        leader = self._view.leader().leader
        while leader and leader not in asked:
            asked.add(leader)
            if leader == self._view.me.node:
                answer = await self._ensure(ask)
            else:
                try:
                    answer = await self._calls.call(leader, "ensure", ask, Ensured, timeout=timeout)
                except PeerError as error:
                    return Ensured(Verdict.ELSEWHERE, message=f"the leader can't be asked: {error}")
            if answer.verdict is not Verdict.ELSEWHERE:
                return answer
            leader = answer.leader
        return Ensured(Verdict.ELSEWHERE, message="there is no leader just now")

    async def drop(self, drop: Drop) -> Dropped:
        """Have a model unloaded, wherever the leader is.

        Raises:
            PeerError: the leader could not be asked.
        """
        leader = self._view.leader().leader
        for _ in range(3):
            if not leader:
                break
            if leader == self._view.me.node:
                answer = await self._drop(drop)
            else:
                answer = await self._calls.call(leader, "drop", drop, Dropped, timeout=UNLOAD_TIMEOUT + 5)
            if not answer.leader:
                return answer
            leader = answer.leader
        raise PeerError(leader, "there is no leader just now", transport=True)

    async def preview(self, ask: Ensure) -> PlanPreview:
        """What `ensure` would do, without doing it. Any node can tell: all know the records."""
        world = await self._world(ask)
        if isinstance(world, Refuse):
            return preview_of(world, None)
        decision = await asyncio.to_thread(decide, ask, world)
        if isinstance(decision, Use | Wait | Otherwise):
            # What runs already is an answer, but the question was what a load would place.
            world = unloaded(world)
            other = await asyncio.to_thread(decide, replace(ask, ollama=False), world)
            return preview_of(decision, world, other)
        return preview_of(decision, world)

    def foresee(self, model: str) -> PlanPreview | None:
        """What would come of a model that no node has, by its profile; None when the settings have none."""
        profile = profile_of(self._settings.models.profiles, model)
        if profile is None:
            return None
        return foresee(model, profile, self._view.live(), self._settings)

    # As the leader

    @property
    def _leads(self) -> bool:
        return self._view.leader().leader == self._view.me.node

    def _elsewhere(self) -> Ensured:
        leader = self._view.leader().leader
        return Ensured(Verdict.ELSEWHERE, leader=leader if leader != self._view.me.node else "")

    async def _on_ensure(self, caller: str, ask: Ensure) -> Ensured:
        return await self._ensure(ask)

    async def _on_drop(self, caller: str, drop: Drop) -> Dropped:
        return await self._drop(drop)

    async def _ensure(self, ask: Ensure) -> Ensured:
        if not self._leads:
            return self._elsewhere()
        end = asyncio.get_running_loop().time() + SOON
        while True:
            changed = self._changed
            world = await self._world(ask)
            if isinstance(world, Refuse):
                return _answer(world)
            decision = await asyncio.to_thread(decide, ask, world)
            left = end - asyncio.get_running_loop().time()
            # What is in use by the records may be idle by now: they are a moment old.
            if not isinstance(decision, Soon | Otherwise) or left <= 0:
                break
            # Owners wait for a silent head; where the head is known to be dead they need not.
            await self._carrier.release_orphans(world.orphans(), self._view.leader())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
        if isinstance(decision, FetchFirst):
            return await self._have_fetched(decision)
        if not isinstance(decision, Place):
            return _answer(decision)
        model = world.holders[0][1]
        # Those who want the same wait for one placement; how long it may be idle is no part of it.
        key = replace(
            ask,
            model="" if model.digest else model.name,
            digest=model.digest,
            embedding=for_embedding(ask, model),
            keep_alive=None,
        )
        job = self._jobs.get(key)
        if job is None:
            job = asyncio.create_task(self._carry_out(ask), name=f"placing {model.name}")
            self._jobs[key] = job
            job.add_done_callback(lambda done: self._job_done(key, done))
        done, _ = await asyncio.wait([job], timeout=ANSWER_WITHIN)
        if not done:
            return Ensured(Verdict.PLANNING, message=f"room for {model.name} is being made")
        if job.cancelled():
            return self._elsewhere()
        return job.result()

    async def _replicate(self) -> None:
        """Give a model with a long line one more endpoint, where memory is free."""
        while True:
            await asyncio.sleep(REPLICA_EVERY)
            wanted = self._lines.observe(self._view.live(), self._clock())
            for model, digest, embedding in wanted if self._leads else ():
                ask = Ensure(model, digest, embedding=embedding, ollama=False, more=True)
                try:
                    answer = await self._ensure(ask)
                except Exception:
                    # It is thought of again; other models' lines must not suffer meanwhile.
                    log.exception("one more of %s could not be loaded by a fault of our own", model)
                    continue
                if answer.verdict is Verdict.WAIT:
                    log.info("%s has a long line: one more is loaded", model)

    async def _have_fetched(self, fetch: FetchFirst) -> Ensured:
        """Have the head-to-be get the file, or say how far it is. The caller asks again, and then we do."""
        node = fetch.place.plan.head
        order = Fetch(self._view.leader(), fetch.model, fetch.digest)
        try:
            state = await self._calls.call(node, "fetch", order, Fetched, timeout=FETCH_TIMEOUT)
        except PeerError as error:
            state = Fetched(failed=str(error))
        if state.failed:
            log.info("%s does not fetch %s: %s", node, fetch.model, state.failed)
            self._fetches.failed(_fetch_key(node, fetch.digest), state.failed, self._clock())
            return Ensured(Verdict.PLANNING, message=f"{fetch.model} is planned anew: {state.failed}")
        if state.total:
            message = f"{fetch.message} {state.completed / state.total:.0%} of it has come."
        else:
            message = fetch.message
        await asyncio.sleep(FETCH_LOOK)
        return Ensured(Verdict.PLANNING, message=message)

    def _job_done(self, key: Ensure, job: asyncio.Task[Ensured]) -> None:
        self._jobs.pop(key, None)
        _tell_fault(job)

    async def _carry_out(self, ask: Ensure) -> Ensured:
        """Place a model. Placements go one after the other, so that no byte is planned for twice."""
        out: dict[str, str] = {}
        usual = self._settings.placement.keep_alive
        keep_alive = usual if ask.keep_alive is None else ask.keep_alive
        async with self._turn:
            for _ in range(ATTEMPTS):
                term = self._view.leader()
                if not self._leads:
                    return self._elsewhere()
                world = await self._world(ask, out)
                if isinstance(world, Refuse):
                    return _answer(world)
                decision = await asyncio.to_thread(decide, ask, world)
                if not isinstance(decision, Place):
                    return _answer(decision)
                try:
                    deployment = await self._carrier.carry_out(decision, keep_alive, term, out)
                except StaleError:
                    return self._elsewhere()
                if deployment:
                    return Ensured(
                        Verdict.WAIT, deployment, decision.plan.head, reasons=decision.plan.reasons
                    )
        return Ensured(
            Verdict.REFUSED,
            fault=Fault.UNAVAILABLE.value,
            message=f"{ask.model} could not be placed: {_story(out) or 'the memory changed under the plan'}.",
            retry_after=5.0,
        )

    async def _drop(self, drop: Drop) -> Dropped:
        term = self._view.leader()
        if not self._leads:
            return Dropped(leader=term.leader)
        name = self._library.resolve(drop.model).name or drop.model
        ours = loaded_of(self._view.live(), drop.model, name, drop.digest)
        wanted = sorted({*ours, *drop.seen})
        done = await asyncio.gather(
            *(
                self._carrier.unload(node, deployment, term, drop.reason, force=drop.force)
                for node, deployment in wanted
            )
        )
        told = list(zip((deployment for _, deployment in wanted), done, strict=True))
        return Dropped(
            ended=tuple(deployment for deployment, one in told if one.ok),
            refused=tuple((deployment, one.reason) for deployment, one in told if not one.ok),
        )

    # Inside

    def _observe(self) -> None:
        self._memory.observe(self._view.live(), self._clock())
        self._changed.set()
        self._changed = asyncio.Event()

    async def _world(self, ask: Ensure, out: dict[str, str] | None = None) -> World | Refuse:
        """What a decision on this model is made from, or why there can be none."""
        holders = await self._holders(ask)
        if not holders:
            resolved = self._library.resolve(ask.model)
            if ask.digest and not resolved.candidates:
                # The caller knew it a moment ago.
                gone = f"No node that has {ask.model} is there any more: it left the cluster or died."
                return Refuse(Fault.UNAVAILABLE, gone, retry_after=5.0)
            refusal = unresolved(resolved)
            message = refusal.message or f"model {ask.model!r} not found"
            return Refuse(refusal.fault, message, retry_after=refusal.retry_after)
        records = self._view.live()
        holders = with_refusals(holders, records)
        shape = await self._shape(holders)
        now = self._clock()
        records = self._view.live()
        self._memory.observe(records, now)
        model = holders[0][1]
        left_out = {
            **self._memory.out(records, now),
            **dict.fromkeys(ask.exclude, "it has just failed"),
            **(out or {}),
        }
        return World(
            records=records,
            holders=holders,
            shape=shape,
            settings=self._settings,
            promises=self._memory.promises(),
            gone=self._memory.gone(),
            returning=self._memory.returning(now),
            unwilling=self._memory.refusing(),
            out=left_out,
            pooled=self._memory.pooled(),
            truth=self._memory.truth(),
            blocked=self._memory.models.blocked(model.digest, now),
            avoided=self._memory.avoided(records, now),
            passing=self._memory.passing(records, now),
            last_resort=self._memory.spare(records, now) - set(ask.exclude) - (out or {}).keys(),
            expected=self._memory.expected(now),
            departed=self._memory.departed(),
            unfetched=frozenset(
                record.node
                for record in records
                if self._fetches.blocked(_fetch_key(record.node, model.digest), now) is not None
            ),
            correction=self._corrections(model.architecture),
        )

    async def _holders(self, ask: Ensure) -> tuple[tuple[str, Model], ...]:
        """Who has the model. One that the caller knows may be so new that its node's list is on its way."""
        for _ in range(_LOOKS):
            holders = self._library.find(ask.model)
            if holders or not ask.digest:
                return holders
            await asyncio.sleep(_LOOK)
        return ()

    async def _shape(self, holders: tuple[tuple[str, Model], ...]) -> Shape | None:
        """The header as the first node that answers has it; every node has the same content."""
        me = self._view.me.node
        usable = [(node, model) for node, model in holders if runs_on_llama(model)]
        for pause in SHAPE_PAUSES:
            for node, model in sorted(usable, key=lambda pair: pair[0] != me)[:3]:
                try:
                    return await self._library.shape(node, model)
                except LookupError as error:
                    log.info("%s", error)
            if usable:
                await asyncio.sleep(pause)
        return None


def _tell_fault(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended by a fault of our own", task.get_name(), exc_info=task.exception())


def _answer(decision: Decision) -> Ensured:
    match decision:
        case Use(endpoint, node, reason):
            return Ensured(Verdict.USE, endpoint, node, State.READY, reasons=(reason,))
        case Wait(deployment, head):
            return Ensured(Verdict.WAIT, deployment, head, State.LOADING)
        case Otherwise(deployment, node, message):
            message = f"{message}; ask again when it is idle, or unload it first."
            return Ensured(
                Verdict.REFUSED,
                deployment,
                node,
                fault=Fault.UNAVAILABLE.value,
                message=message,
                retry_after=10.0,
            )
        case Soon() | FetchFirst():
            return Ensured(Verdict.PLANNING, message=decision.message)
        case Refuse(fault, message, retry_after):
            return Ensured(Verdict.REFUSED, fault=fault.value, message=message, retry_after=retry_after)
        case Place():
            raise AssertionError("a placement is carried out, not answered")


def _fetch_key(node: str, digest: str) -> str:
    return f"{node} {digest}"


def _story(out: dict[str, str]) -> str:
    return "; ".join(f"{node}: {reason}" for node, reason in out.items())
