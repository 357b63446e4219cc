"""Loads lost pinned models again, and ends redundant and outdated ones, on the node that leads."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, Record, State
from sollold.cluster.net.view import View, name_of
from sollold.leader.apply import PlanApplier
from sollold.leader.existing import as_it_ran
from sollold.leader.messages import Ensure, Ensured, Verdict
from sollold.leader.pinned import PinnedPolicy, redundant_pins
from sollold.leader.snapshot import in_use
from sollold.leader.snapshot_maker import SnapshotMaker

log = logging.getLogger("sollold.leader")

UPDATED_IDLE = 5.0
"""Seconds of idleness after which a pinned model is replaced by its newer version."""


class PinnedModels:
    """Acts on what `PinnedPolicy` finds. ``ensure`` makes an endpoint serve a model; the text is for logs."""

    def __init__(
        self,
        view: View,
        snapshots: SnapshotMaker,
        applier: PlanApplier,
        policy: PinnedPolicy,
        ensure: Callable[[Ensure, str], Awaitable[Ensured]],
        clock: Callable[[], float],
    ) -> None:
        self._view = view
        self._snapshots = snapshots
        self._applier = applier
        self._policy = policy
        self._ensure = ensure
        self._clock = clock

    async def look(self, records: Sequence[Record]) -> None:
        """Do what is due."""
        for head, endpoint in self._policy.due(records, self._clock()):
            await self._load_again(head, endpoint)
        limit = self._snapshots.settings.placement.keep_alive
        redundant = redundant_pins(records) if limit >= 0 else {}
        for record in records:
            for endpoint in record.endpoints:
                if self._is_outdated(record, endpoint):
                    self._policy.note_replaced([endpoint.id])
                    reason = "replaced by its newer version, which stays loaded in its place"
                elif endpoint.id in redundant and not in_use(endpoint) and endpoint.idle >= limit:
                    reason = f"idle for {endpoint.idle:.0f} s, and another like it stays loaded"
                else:
                    continue
                term = self._view.leader()
                await self._applier.end_when_idle(record.node, endpoint.id, term, reason)

    async def _load_again(self, head: str, endpoint: Endpoint) -> None:
        """Load a lost pinned model again, with the options it had; if it was updated, the newer version."""
        model = endpoint.model
        ask = Ensure(
            model,
            self._snapshots.digest_now(model, endpoint.digest),
            keep_alive=-1.0,
            embedding=endpoint.embedding,
            ollama=False,
            in_ollama=InOllama(template=endpoint.template),
        )
        again = as_it_ran(ask, endpoint.asked, self._snapshots.settings.placement.context)
        ensured = await self._ensure(again, "load again")
        lost = f"{model} was to stay loaded and was lost (head {name_of(self._view, head)})"
        if ensured.verdict is Verdict.WAIT:
            log.info("%s: loading it again on %s", lost, name_of(self._view, ensured.node))
        elif ensured.verdict is Verdict.USE:
            self._policy.forget(endpoint.id)  # Its newer version is loaded.
        elif ensured.verdict is Verdict.REFUSED and self._policy.should_log(
            endpoint, ensured.message, self._clock()
        ):
            log.warning("%s: it can't be loaded again yet: %s", lost, ensured.message)

    def _is_outdated(self, record: Record, endpoint: Endpoint) -> bool:
        """Return whether an idle pinned deployment is to end so that the newer version is loaded.

        No new request is served by it, and it would keep its memory for ever.
        """
        return (
            endpoint.pinned
            and endpoint.backend is not Backend.OLLAMA
            and endpoint.state is State.READY
            and not (endpoint.closing or record.draining or in_use(endpoint))
            and endpoint.idle >= UPDATED_IDLE
            and self._snapshots.is_outdated(endpoint)
        )
