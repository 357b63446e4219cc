"""Unloads a model on command, wherever it runs, and cancels what is pending for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sollold.cluster.net.view import View
from sollold.leader.apply import PlanApplier
from sollold.leader.messages import Drop, Dropped
from sollold.leader.observations import Observations
from sollold.leader.pending import PendingLoads
from sollold.leader.pinned import PinnedPolicy
from sollold.leader.snapshot import loaded_of
from sollold.models.library import Library

log = logging.getLogger("sollold.leader")


class Unloader:
    """Unloads models for the leader; uses the leader's own components."""

    def __init__(
        self,
        view: View,
        library: Library,
        observations: Observations,
        pinned: PinnedPolicy,
        pending: PendingLoads,
        applier: PlanApplier,
        clock: Callable[[], float],
    ) -> None:
        self._view = view
        self._library = library
        self._observations = observations
        self._pinned = pinned
        self._pending = pending
        self._applier = applier
        self._clock = clock

    async def unload(self, drop: Drop) -> Dropped:
        """Unload a model's deployments and cancel what is pending for it.

        If another node leads, only unpin the model, and return the leader.
        """
        term = self._view.leader()
        name = self._library.resolve(drop.model).name or drop.model
        forgotten = self._pinned.forget(drop.model, name)
        self._observations.forget(drop.model, name)
        if term.leader != self._view.me.node:
            return Dropped(leader=term.leader)
        if forgotten:
            await self._applier.tell_others(drop)
        names = {drop.model.lower(), name.lower()}
        if not drop.force and self._pending.waited_for(names, self._clock()):
            why = f"{name} is being placed for a request that waits"
            return Dropped(refused=((name, why),), forgotten=forgotten)
        cancelled = await self._cancel_pending(names, name)
        running = loaded_of(self._view.live(), drop.model, name)
        # The records do not show what was ordered a moment ago.
        ordered = {
            (accepted.plan.head, accepted.deployment)
            for accepted in self._observations.accepted()
            if {accepted.deployment.lower(), accepted.plan.model.lower()} & names
        }
        wanted = sorted({*running, *ordered, *drop.seen})
        self._pinned.note_unloading(deployment for _, deployment in wanted)
        done = await asyncio.gather(
            *(
                self._applier.unload(node, deployment, term, drop.reason, force=drop.force)
                for node, deployment in wanted
            )
        )
        results = list(zip((deployment for _, deployment in wanted), done, strict=True))
        for deployment, result in results:
            if not result.ok:
                self._pinned.keep(deployment)
        return Dropped(
            ended=tuple(deployment for deployment, result in results if result.ok),
            refused=tuple((deployment, result.reason) for deployment, result in results if not result.ok),
            forgotten=forgotten,
            cancelled=cancelled,
        )

    async def _cancel_pending(self, names: set[str], model: str) -> bool:
        """Cancel the placements and fetches of a model that is not loading yet; return whether any were."""
        jobs, fetches = self._pending.cancel(names, self._clock())
        if not jobs and not fetches:
            return False
        log.info("the load of %s is cancelled: it is unloaded by order", model)
        # Wait until they have released their reservations.
        await asyncio.gather(*jobs, return_exceptions=True)
        await asyncio.gather(*(self._applier.stop_fetch(fetch) for fetch in fetches))
        return True
