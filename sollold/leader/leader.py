"""The leader's I/O shell: serves the requests of nodes, and carries out placements, one after the other.

A node leads while its view says so; otherwise it redirects to the leader. Nothing here matters after a change
of leader: the next one reads the records and continues.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.engines.commands import Fetch, Fetched
from sollold.errors import Fault, unloaded_by_force
from sollold.leader.answer import answer, may_change
from sollold.leader.apply import PlanApplier, StaleError
from sollold.leader.decide import decide
from sollold.leader.decision import FetchFirst, HoldersAway, Place, Refuse
from sollold.leader.existing import Mismatch, ReloadWhenIdle, Use, Wait, for_embedding
from sollold.leader.messages import Drop, Dropped, Ensure, Ensured, Verdict
from sollold.leader.observations import Observations
from sollold.leader.pending import PendingFetch, PendingLoads
from sollold.leader.pinned import LostModel, PinnedPolicy
from sollold.leader.pinned_models import PinnedModels
from sollold.leader.preview import PlanPreview, outline_from_profile, preview_of
from sollold.leader.replicas import ReplicaPolicy
from sollold.leader.snapshot import ClusterSnapshot, unloaded
from sollold.leader.snapshot_maker import SnapshotMaker
from sollold.leader.unload import Unloader
from sollold.models.footprint.shape import Shape
from sollold.models.library import Library
from sollold.models.model import Model
from sollold.placement.cost_model import Correction, uncorrected
from sollold.placement.request import profile_of
from sollold.placement.speculation import MeasuredDrafts, nothing_measured
from sollold.retry import LogAndRetry
from sollold.settings.schema import Settings
from sollold.tasks import cancel_and_wait, log_failure
from sollold.turns import next_turn, sleep_until_set

log = logging.getLogger("sollold.leader")

ANSWER_WITHIN = 20.0
"""Maximum seconds before a caller gets a response, PLANNING if nothing else."""
ATTEMPTS = 6
LOOK_EVERY = 3.0
"""Seconds between two checks of the queues and of the pinned models."""
FETCH_TIMEOUT = 5.0
FETCH_LOOK = 0.5
"""Seconds to hold a caller's request while a file is being fetched."""
SOON = 1.0
"""Maximum seconds to hold a caller's request while the decision may still change."""
CLOSE_AFTER = 10.0
"""Seconds that a request waits for a deployment to be idle before that admits no new ones."""
FORGET_RELOAD = 5.0
"""Seconds without a retry after which a waiting request counts as gone."""


class Leader:
    """Does the leader's work while this node leads. Call `register` and `start`, finally `close`.

    Args:
        corrections: maps an architecture to the correction of the devices' speeds.
        clock: monotonic seconds.
        draft_stats: maps a model's digest to the measured drafts for it.
    """

    def __init__(
        self,
        settings: Settings,
        view: View,
        calls: RpcClient,
        library: Library,
        corrections: Callable[[str], Correction] = lambda architecture: uncorrected,
        clock: Callable[[], float] = time.monotonic,
        draft_stats: Callable[[str], MeasuredDrafts] = lambda digest: nothing_measured,
    ) -> None:
        self._settings = settings
        self._view = view
        self._calls = calls
        self._clock = clock
        self._observations = Observations(settings.serving.drain_limit)
        self._snapshots = SnapshotMaker(
            settings,
            view,
            library,
            self._observations,
            corrections=corrections,
            draft_stats=draft_stats,
            clock=clock,
        )
        self._applier = PlanApplier(view, calls, self._observations, clock)
        self._pending = PendingLoads()
        self._one_at_a_time = asyncio.Semaphore(1)
        """Serialises placements: the next is planned once the previous one has reserved its memory."""
        self._replica_policy = ReplicaPolicy()
        self._pinned = PinnedPolicy()
        self._pins = PinnedModels(
            view, self._snapshots, self._applier, self._pinned, self._ensure_unasked, clock
        )
        self._unloader = Unloader(
            view, library, self._observations, self._pinned, self._pending, self._applier, clock
        )
        self._watch: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()
        self._reloads: dict[str, tuple[float, float]] = {}
        """For each deployment to reload: since when, and when last, a request waited for that."""

    def use_settings(self, settings: Settings) -> None:
        """Use these settings from the next placement on."""
        self._settings = self._snapshots.settings = settings

    def register(self, server: RpcServer) -> None:
        """Register the peer methods ``ensure`` and ``drop``."""
        server.method("ensure", Ensure, lambda caller, ask: self.ensure(ask))
        server.method("drop", Drop, lambda caller, drop: self.unload(drop))

    async def start(self) -> None:
        """Start watching the records."""
        self._unsubscribe = self._view.subscribe(self._observe)
        self._observe()
        self._watch = asyncio.create_task(self._look(), name="replicas and pinned models")
        self._watch.add_done_callback(log_failure)

    async def close(self) -> None:
        """Cancel placements under way; their reservations expire by themselves."""
        self._unsubscribe()
        self._unsubscribe = lambda: None
        await cancel_and_wait(*self._pending.tasks(), self._watch)
        self._watch = None

    async def preview(self, ask: Ensure, remote: tuple[Model, Shape] | None = None) -> PlanPreview:
        """Preview what `ensure` would do. Any node can do this, since all know the records.

        ``remote``: a model that no node has, planned as if this node had it.
        """
        if remote is not None:
            model, shape = remote
            snapshot: ClusterSnapshot | HoldersAway | Refuse = self._snapshots.of_model(
                ((self._view.me.node, model),), shape
            )
        else:
            snapshot = await self._snapshots.of(ask)
        if not isinstance(snapshot, ClusterSnapshot):
            return preview_of(snapshot, None)
        decision = await asyncio.to_thread(decide, ask, snapshot)
        if isinstance(decision, Use | Wait | Mismatch | ReloadWhenIdle):
            # The model runs already, but a preview also shows what a load would place.
            snapshot = unloaded(snapshot)
            fresh = await asyncio.to_thread(decide, replace(ask, ollama=False), snapshot)
            return preview_of(decision, snapshot, fresh)
        return preview_of(decision, snapshot)

    def outline_from_profile(self, model: str) -> PlanPreview | None:
        """Outline the plan of a model that no node has, by its profile; None when the settings have none."""
        profile = profile_of(self._settings.models.profiles, model)
        if profile is None:
            return None
        return outline_from_profile(model, profile, self._view.live(), self._settings)

    def lost(self) -> tuple[LostModel, ...]:
        """Return the lost models that will be loaded again, with the names of their former heads."""
        found = self._pinned.lost(self._clock())
        return tuple(replace(lost_model, head=name_of(self._view, lost_model.head)) for lost_model in found)

    # As the leader

    @property
    def _leads(self) -> bool:
        return self._view.leader().leader == self._view.me.node

    def _elsewhere(self) -> Ensured:
        leader = self._view.leader().leader
        return Ensured(Verdict.ELSEWHERE, leader=leader if leader != self._view.me.node else "")

    async def ensure(self, ask: Ensure) -> Ensured:
        """Make an endpoint serve a model; ELSEWHERE if another node leads."""
        if not self._leads:
            return self._elsewhere()
        began = self._clock() - ask.waited
        end = asyncio.get_running_loop().time() + SOON
        while True:
            if self._pending.is_cancelled(ask.model, began):
                return _cancelled(ask.model)
            changed = self._changed
            snapshot = await self._snapshots.of(ask)
            if not isinstance(snapshot, ClusterSnapshot):
                return answer(snapshot)
            decision = await asyncio.to_thread(decide, ask, snapshot)
            left = end - asyncio.get_running_loop().time()
            # The records are a moment old: what they show in use may be idle by now.
            if not may_change(decision) or left <= 0:
                break
            # Owners wait for a silent head; release the grants of heads that are known to be dead.
            await self._applier.release_orphans(snapshot.orphans(), self._view.leader())
            await sleep_until_set(changed, left)
        if self._pending.is_cancelled(ask.model, began):
            return _cancelled(ask.model)
        if isinstance(decision, ReloadWhenIdle):
            await self._close_for_reload(decision)
        if isinstance(decision, FetchFirst):
            return await self._have_fetched(decision)
        if not isinstance(decision, Place):
            return answer(decision)
        model = snapshot.holders[0][1]
        # Callers with equal requests share one placement; keep_alive does not matter for that.
        key = replace(
            ask,
            model="" if model.digest else model.name,
            digest=model.digest,
            embedding=for_embedding(ask, model),
            keep_alive=None,
            waited=0.0,
        )
        job = self._pending.job(key)
        if job is None:
            job = self._pending.start(key, model.name, self._carry_out(ask))
            job.add_done_callback(log_failure)
        done, _ = await asyncio.wait([job], timeout=ANSWER_WITHIN)
        if not done:
            return Ensured(Verdict.PLANNING, message=f"making room for {model.name}")
        if job.cancelled():
            by_order = self._pending.is_cancelled(ask.model, began)
            return _cancelled(ask.model) if by_order else self._elsewhere()
        return job.result()

    async def _look(self) -> None:
        """Periodically load replicas of models with long queues, and reload lost pinned models."""
        attempt = LogAndRetry("the check of queues and pinned models", log)
        while True:
            await next_turn(LOOK_EVERY)
            with attempt:
                await self._look_once()

    async def _look_once(self) -> None:
        records = self._view.live()
        wanted = self._replica_policy.observe(records, self._clock())
        if not self._leads:
            return
        for model, digest, embedding in wanted:
            ask = Ensure(model, digest, embedding=embedding, ollama=False, more=True)
            ensured = await self._ensure_unasked(ask, "start a replica of")
            if ensured.verdict is Verdict.WAIT:
                log.info("%s: queue is long, starting a replica", model)
        await self._pins.look(records)

    async def _ensure_unasked(self, ask: Ensure, action: str) -> Ensured:
        try:
            return await self.ensure(ask)
        except Exception:
            # It is tried again later; an error must not affect other models.
            log.exception("could not %s %s: internal error", action, ask.model)
            return Ensured(Verdict.PLANNING)

    async def _have_fetched(self, fetch: FetchFirst) -> Ensured:
        """Have the future head fetch the file, and report its progress; the caller keeps asking."""
        node = fetch.place.plan.head
        order = Fetch(self._view.leader(), fetch.model, fetch.digest)
        self._pending.note_request(PendingFetch(node, fetch.model, fetch.digest, self._clock()))
        try:
            state = await self._calls.call(node, "fetch", order, Fetched, timeout=FETCH_TIMEOUT)
        except PeerError as error:
            state = Fetched(failed=str(error))
        if state.done or state.failed:
            self._pending.fetch_ended(node, fetch.digest)
        if state.failed:
            log.info("%s does not fetch %s: %s", name_of(self._view, node), fetch.model, state.failed)
            self._snapshots.fetch_failed(node, fetch.digest, state.failed)
            return Ensured(Verdict.PLANNING, message=f"{fetch.model} is being planned again: {state.failed}")
        if state.total:
            message = f"{fetch.message} {state.completed / state.total:.0%} of it has come."
        else:
            message = fetch.message
        await asyncio.sleep(FETCH_LOOK)
        return Ensured(Verdict.PLANNING, message=message)

    async def _close_for_reload(self, reload: ReloadWhenIdle) -> None:
        """Have a deployment admit no new requests once a request for more context has waited long enough.

        Otherwise, with many callers, it would never be idle.
        """
        now = self._clock()
        deployment = reload.endpoint
        self._reloads = {key: times for key, times in self._reloads.items() if now - times[1] < FORGET_RELOAD}
        since = self._reloads.get(deployment, (now, now))[0]
        self._reloads[deployment] = (since, now)
        if reload.located is not None and now - since >= CLOSE_AFTER:
            log.info("%s: new requests wait until it is reloaded", reload.message)
            why = "reloaded with more context"
            await self._applier.end_when_idle(reload.node, deployment, self._view.leader(), why)

    async def _carry_out(self, ask: Ensure) -> Ensured:
        """Place a model. Placements are serialised, so that no memory is planned for twice."""
        excluded: dict[str, str] = {}
        fetch: FetchFirst | None = None
        async with self._one_at_a_time:
            for _ in range(ATTEMPTS):
                term = self._view.leader()
                if not self._leads:
                    return self._elsewhere()
                snapshot = await self._snapshots.of(ask, excluded)
                if not isinstance(snapshot, ClusterSnapshot):
                    return answer(snapshot)
                decision = await asyncio.to_thread(decide, ask, snapshot)
                if isinstance(decision, FetchFirst):
                    # The node with the file has just refused.
                    fetch = decision
                    break
                if excluded and isinstance(decision, Refuse) and decision.fault is Fault.TOO_BIG:
                    break  # It fits if the excluded nodes take part.
                if not isinstance(decision, Place):
                    return answer(decision)
                keep_alive = ask.keep_alive
                if keep_alive is None:
                    model = snapshot.holders[0][1]
                    stays = self._pinned.is_lost(model.name, model.digest)
                    stays = stays or self._pinned.has_other_version(model.name, model.digest)
                    keep_alive = -1.0 if decision.pinned or stays else self._settings.placement.keep_alive
                if decision.pinned:
                    self._pinned.note_replaced(victim for _, victim, _ in decision.evictions)
                try:
                    deployment = await self._applier.apply(decision, keep_alive, term, excluded)
                except StaleError:
                    return self._elsewhere()
                if deployment:
                    return Ensured(
                        Verdict.WAIT, deployment, decision.plan.head, reasons=decision.plan.reasons
                    )
        if fetch is not None:
            return await self._have_fetched(fetch)
        reasons = [f"{name_of(self._view, node)}: {reason}" for node, reason in excluded.items()]
        why = "; ".join(reasons) or "memory changed while planning"
        return Ensured(
            Verdict.REFUSED,
            fault=Fault.UNAVAILABLE.value,
            message=f"{ask.model} could not be placed: {why}.",
            retry_after=5.0,
        )

    async def unload(self, drop: Drop) -> Dropped:
        """Unload a model; see `Unloader.unload`."""
        return await self._unloader.unload(drop)

    def _observe(self) -> None:
        records = self._view.live()
        self._observations.observe(records, self._clock())
        self._pinned.observe(records, self._clock())
        self._changed.set()
        self._changed = asyncio.Event()


def _cancelled(model: str) -> Ensured:
    refusal = unloaded_by_force(model)
    return Ensured(Verdict.REFUSED, fault=refusal.fault.value, message=refusal.message)
