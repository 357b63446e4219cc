"""Collects what a decision is based on: records, holders of the model, its header, observations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from sollold.cluster.gossip.record import Endpoint
from sollold.cluster.net.view import View, name_of
from sollold.errors import Fault
from sollold.leader.backoff import Backoff
from sollold.leader.decision import HoldersAway, Refuse
from sollold.leader.draft_models import drafters
from sollold.leader.messages import Ensure
from sollold.leader.observations import Observations
from sollold.leader.snapshot import ClusterSnapshot, runs_on_llama, with_refusals
from sollold.models.footprint.shape import Shape
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.models.names import parse, unresolved
from sollold.placement.cost_model import Correction
from sollold.placement.request import AUTO, normalised_speculation
from sollold.placement.speculation import Drafter, MeasuredDrafts
from sollold.settings.schema import Settings

log = logging.getLogger("sollold.leader")

SHAPE_PAUSES = (0.3, 1.0, 0.0)
"""Seconds of pause after each attempt to read a header: its holder may be busy recovering from a fault."""
FETCH_AGAIN = 60.0
"""Seconds before a node that failed to fetch a file is first considered again; doubles with each failure."""
_LOOKUPS, _LOOKUP_SECONDS = 30, 0.1
"""Number of look-ups, and pause after each in seconds, for a model that the caller's node knows already."""


class SnapshotMaker:
    """Makes the snapshots.

    Args:
        corrections: maps an architecture to the correction of the devices' speeds.
        draft_stats: maps a model's digest to the measured drafts for it.
        clock: monotonic seconds.

    Attributes:
        settings: the current settings.
    """

    def __init__(
        self,
        settings: Settings,
        view: View,
        library: Library,
        observations: Observations,
        *,
        corrections: Callable[[str], Correction],
        draft_stats: Callable[[str], MeasuredDrafts],
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self._view = view
        self._library = library
        self._observations = observations
        self._corrections = corrections
        self._draft_stats = draft_stats
        self._clock = clock
        self._fetches = Backoff(free=0, first=FETCH_AGAIN)

    def fetch_failed(self, node: str, digest: str, reason: str) -> None:
        """Note that ``node`` failed to fetch a model's file."""
        self._fetches.failed((node, digest), reason, self._clock())

    async def of(
        self, ask: Ensure, excluded: dict[str, str] | None = None
    ) -> ClusterSnapshot | HoldersAway | Refuse:
        """Return the snapshot for a request, or the decision if the model's holders are away or unknown."""
        holders = await self._holders(ask)
        if not holders:
            resolved = self._library.resolve(ask.model)
            if ask.digest and not resolved.candidates:
                # The caller's node knew it a moment ago.
                back = {record.name for record in self._observations.expected(self._clock())}
                if awaited := ", ".join(sorted(back & set(resolved.away))):
                    return HoldersAway(f"{ask.model} waits for {awaited}: it has the file and was just here.")
                gone = (
                    f"No node has {ask.model} any more: those that had it are offline, or its files were "
                    "moved, removed or closed to the daemon."
                )
                return Refuse(Fault.UNAVAILABLE, gone, retry_after=5.0)
            refusal = unresolved(resolved)
            message = refusal.message or f"model {ask.model!r} not found"
            return Refuse(refusal.fault, message, retry_after=refusal.retry_after)
        if not _has_content(ask, holders):
            # Another version would never serve the caller, who asks for this one.
            replaced = f"{ask.model} was replaced by another version; send the request again"
            return Refuse(Fault.UNAVAILABLE, replaced, retry_after=1.0)
        holders = with_refusals(holders, self._view.live())
        shape, unread = await self._shape(holders)
        model = holders[0][1]
        candidates = await self._drafters(ask, model)
        snapshot = self.of_model(holders, shape, excluded)
        return replace(
            snapshot, drafters=candidates, unread=unread, smaller=_smaller(self._library.all(), model)
        )

    def digest_now(self, model: str, digest: str) -> str:
        """Return the digest of the content that a name means now; ``digest`` if no node has the model."""
        holders = self._library.find(model)
        return holders[0][1].digest if holders else digest

    def is_outdated(self, endpoint: Endpoint) -> bool:
        """Return whether its name means other content now, and no node has its own content any more."""
        newer = self.digest_now(endpoint.model, endpoint.digest) != endpoint.digest
        return newer and not self._library.nodes_with(endpoint.digest)

    async def _drafters(self, ask: Ensure, model: Model) -> dict[str, tuple[tuple[Drafter, ...], str]]:
        """Return the `drafters` for the requested speculation, and for that of deployments of this model.

        The latter may be reloaded with the options they were started with.
        """
        live = self._view.live()
        wanted = {normalised_speculation(ask.placement.over(self.settings.placement).speculation)}
        wanted |= {
            e.asked.speculation for record in live for e in record.endpoints if e.digest == model.digest
        }
        # With a single device in the cluster, AUTO drafts nothing.
        alone = sum(len(record.devices) for record in live) < 2
        names = wanted - {"", *({AUTO} if alone else ())}
        me = self._view.me.node
        return {name: await drafters(self._library, me, name, model) for name in sorted(names)}

    def of_model(
        self,
        holders: tuple[tuple[str, Model], ...],
        shape: Shape | None,
        excluded: dict[str, str] | None = None,
    ) -> ClusterSnapshot:
        """Return the snapshot for a model with these holders; ``excluded``: nodes to leave out, and why."""
        now = self._clock()
        records = self._view.live()
        self._observations.observe(records, now)
        model = holders[0][1]
        snapshot = ClusterSnapshot(
            records=records,
            holders=holders,
            shape=shape,
            settings=self.settings,
            unfetched=frozenset(
                record.node
                for record in records
                if self._fetches.blocked((record.node, model.digest), now) is not None
            ),
            correction=self._corrections(model.architecture),
            draft_stats=self._draft_stats(model.digest),
        )
        return self._observations.added_to(snapshot, model.digest, now, excluded or {})

    async def _holders(self, ask: Ensure) -> tuple[tuple[str, Model], ...]:
        """Return the model's holders; wait briefly for content that the caller's node knows already."""
        for _ in range(_LOOKUPS):
            holders = self._library.find(ask.model)
            if not ask.digest or (holders and _has_content(ask, holders)):
                return holders
            await asyncio.sleep(_LOOKUP_SECONDS)
        return self._library.find(ask.model)

    async def _shape(self, holders: tuple[tuple[str, Model], ...]) -> tuple[Shape | None, str]:
        """Return the header from the first node that replies; every node has the same content.

        If none does, return None and the error of the node that was asked last.
        """
        me, why = self._view.me.node, ""
        usable = [(node, model) for node, model in holders if runs_on_llama(model)]
        for pause in SHAPE_PAUSES:
            for node, model in sorted(usable, key=lambda pair: pair[0] != me)[:3]:
                try:
                    return await self._library.shape(node, model), ""
                except LookupError as error:
                    why = f"{name_of(self._view, node)}: {error}"
                    log.info("%s", why)
            if usable:
                await asyncio.sleep(pause)
        return None, why


def _smaller(listed: Iterable[Listed], model: Model) -> dict[str, int]:
    """Return name → size in bytes of the smaller quantizations of a model: other tags of the same name."""
    same = [
        other.model
        for other in listed
        if other.model.size < model.size
        and (other.model.architecture, other.model.layers, other.model.width)
        == (model.architecture, model.layers, model.width)
        and runs_on_llama(other.model)
    ]
    base = replace(parse(model.name), tag="").key
    return {other.name: other.size for other in same if replace(parse(other.name), tag="").key == base}


def _has_content(ask: Ensure, holders: tuple[tuple[str, Model], ...]) -> bool:
    """Return whether the holders have the content that the caller's node knows under the name."""
    known = {ask.digest, *ask.in_ollama.manifests}
    return not ask.digest or any(model.digest in known for _, model in holders)
