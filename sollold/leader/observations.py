"""Holds the leader's short-term memory. Losing it costs nothing but a retry.

Everything that matters is in the records. This only bridges the time until they show what was ordered, and
counts failures. Pure: the time is passed in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field, replace

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.engines.llamacpp.exit_reason import ended_by_signal
from sollold.facts import dataclass
from sollold.leader.absent_nodes import BACK_WITHIN, Absences
from sollold.leader.backoff import Backoff, Blocked
from sollold.leader.snapshot import AcceptedDeployment, ClusterSnapshot, why_blocked

SHOWN_WITHIN = 15.0
"""Seconds within which the records show what was ordered; otherwise it did not happen."""
RETURNED_WITHIN = 2.0
"""Seconds within which reachable owners release the memory of an ended deployment."""
GOOD_SERVICE = 180.0
"""Seconds of service after which earlier faults of a deployment's nodes are forgotten."""
LAST_RESORT = 5.0
"""Seconds after a node's last failure before it may be tried because no other node will do."""
_AVOIDED = 2
"""Failed loads of a model in a row for which a node is avoided if others will do."""
HUNG_COUNTS = 6
"""Failures that one hung load counts as, since another hang would cost a minute again. The node is left out
for 40 seconds if others will do."""
ALL_EVERY = 3.0
"""Seconds after which records that did not change are looked at again, for how long they have served."""
TRUE_FOR = 3.0
"""Seconds for which an owner's own reply about its memory overrides its record."""


@dataclass(slots=True)
class _Entry:
    deployment: AcceptedDeployment
    until: float
    seen: bool = False
    shown: set[str] = field(default_factory=set)
    """Nodes whose records have shown the grant; from then on, the records count."""


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is often asked about a record: with hundreds of nodes, some record changes all the time.

    Attributes:
        endpoints: those of llama.cpp; ``present``: ids of all, ``alive``: of those that have not failed.
        granted: deployments that hold memory of the node.
    """

    record: Record
    endpoints: tuple[Endpoint, ...]
    present: frozenset[str]
    alive: frozenset[str]
    granted: frozenset[str]


def _summary_of(record: Record) -> _Summary:
    return _Summary(
        record,
        tuple(endpoint for endpoint in record.endpoints if endpoint.backend is not Backend.OLLAMA),
        frozenset(endpoint.id for endpoint in record.endpoints),
        frozenset(endpoint.id for endpoint in record.endpoints if endpoint.state is not State.FAILED),
        frozenset(grant.deployment for grant in record.grants),
    )


class Observations:
    """Remembers accepted deployments, failures and the owners' recent replies.

    Args:
        leaving: seconds that a drain may take.
    """

    def __init__(self, leaving: float) -> None:
        self._absences = Absences(leaving)
        self._summaries: dict[str, _Summary] = {}
        """By node, of the records last observed."""
        self._all_due = 0.0
        self._unreachable: dict[str, float] = {}
        self.models = Backoff(free=1)
        self.nodes = Backoff(free=2)
        """Failed loads by node; a blocked node takes no part. Only one load of each model counts (unless it
        hung), since further failures may be the model's fault."""
        self.loads = Backoff(free=2)
        """Failed loads of one model on one node; a blocked node takes no part for that model, and one with
        `_AVOIDED` of them is avoided if others will do: both would be tried again when the model is."""
        self.crashes = Backoff(free=2)
        """Faults of a node in serving deployments; a blocked node is avoided if others will do."""
        self._accepted: dict[str, _Entry] = {}
        self._gone: dict[str, float] = {}
        self._unwilling: dict[str, float] = {}
        self._truth: dict[tuple[str, str], tuple[int, float]] = {}
        self._pooled: dict[str, float] = {}
        self._ended_at: dict[str, float] = {}
        self._failed: set[str] = set()
        self._last_seen: dict[str, float] = {}
        """Time each node was last seen, if within `BACK_WITHIN`."""
        self._departed: frozenset[str] = frozenset()
        self._ready: dict[str, float] = {}
        """Time since when each deployment has been ready."""
        self._answering: dict[str, tuple[Endpoint, ...]] = {}
        """Ready deployments of each head when last seen not draining."""
        self._lost: dict[str, tuple[Endpoint, float]] = {}
        """Each deployment as it was when its head went, and until when that counts."""

    # Events

    def note_accepted(self, deployment: AcceptedDeployment, now: float) -> None:
        """Note that a deployment's head has accepted it."""
        self._accepted[deployment.deployment] = _Entry(deployment, now + SHOWN_WITHIN)

    def ended(self, deployment: str, now: float) -> None:
        """Note that a deployment is gone, whatever the records still show."""
        self._gone[deployment] = now + SHOWN_WITHIN
        self._truth.clear()
        self._accepted.pop(deployment, None)

    def unwilling(self, deployment: str, now: float) -> None:
        """Note that a head refused to unload a deployment, since it had just been used."""
        self._unwilling[deployment] = now + TRUE_FOR

    def told(self, node: str, available: Mapping[str, int], wanted: Mapping[str, int], now: float) -> None:
        """Note that an owner refused ``wanted`` and reported ``available``."""
        for device, size in available.items():
            self._truth[node, device] = (size, now + TRUE_FOR)
        if all(size <= available.get(device, 0) for device, size in wanted.items()):
            # Each would fit by itself, so the devices share one limit.
            self._pooled[node] = now + SHOWN_WITHIN * 20

    def unreachable(self, node: str, reason: str, now: float) -> None:
        """Note that an owner or head could not be reached: soon the records show it gone, or it is back."""
        self._unreachable[node] = now + SHOWN_WITHIN
        self.nodes.failed(node, reason, now)

    def observe(self, records: Sequence[Record], now: float) -> None:
        """Learn from the records what is there now, what failed and what works."""
        self._absences.observe(records, now)
        live = {record.node for record in records}
        self._last_seen = {node: seen for node, seen in self._last_seen.items() if now - seen < BACK_WITHIN}
        self._last_seen |= dict.fromkeys(live, now)
        self._departed = frozenset(self._last_seen.keys() - live)
        known, self._summaries = self._summaries, {}
        changed = []
        for record in records:
            summary = known.get(record.node)
            if summary is None or summary.record is not record:
                summary = _summary_of(record)
                changed.append(summary)
            self._summaries[record.node] = summary
        summaries = self._summaries.values()
        self._note_lost(changed, now)
        self._note_shown()
        if now >= self._all_due:
            self._all_due = now + ALL_EVERY
            changed = list(summaries)
        for summary in changed:
            for endpoint in summary.endpoints:
                if endpoint.state is State.FAILED and endpoint.id not in self._failed:
                    self._failed.add(endpoint.id)
                    self._note_failure(summary.record.node, endpoint, now)
                elif endpoint.state is State.READY:
                    self._note_service(summary.record.node, endpoint, now)
        present = frozenset[str]().union(*(summary.present for summary in summaries))
        self._failed &= present
        self._ready = {key: since for key, since in self._ready.items() if key in present}
        self._note_ends(now)
        self._forget(present, now)

    def _note_shown(self) -> None:
        """Note which accepted deployments the records show."""
        for deployment, entry in list(self._accepted.items()):
            for node, summary in self._summaries.items():
                if deployment in summary.granted:
                    entry.shown.add(node)
                if deployment in summary.present:
                    entry.seen = True
                    if deployment not in summary.alive:
                        self._accepted.pop(deployment, None)

    def _note_failure(self, head: str, endpoint: Endpoint, now: float) -> None:
        reason = f"{endpoint.model}: {endpoint.reason}"
        # Another node may have led when it served.
        if endpoint.id in self._ready or endpoint.answered:
            if endpoint.culprit:
                self.crashes.failed(endpoint.culprit, reason, now)
            return
        node = endpoint.culprit or head
        load = node, endpoint.digest
        if endpoint.hung or not self.loads.known(load, now):
            self.nodes.failed(node, reason, now, least=HUNG_COUNTS if endpoint.hung else 1)
        # A crash is not retried at the same node if others will do: llama.cpp may not suit its machine.
        by_signal = endpoint.crashed and ended_by_signal(endpoint.reason)
        self.loads.failed(load, reason, now, least=_AVOIDED if by_signal else 1)
        if endpoint.culprit in ("", head):
            # A fault of another node than the head is not the model's.
            self.models.failed(endpoint.digest, endpoint.reason or "it did not start", now)

    def _note_service(self, head: str, endpoint: Endpoint, now: float) -> None:
        nodes = {head, *(placed.node for placed in endpoint.placed)}
        if endpoint.id not in self._ready:
            self._ready[endpoint.id] = now
            self.models.succeeded(endpoint.digest)
            for node in nodes:
                self.nodes.succeeded(node)
                self.loads.succeeded((node, endpoint.digest))
        elif now - self._ready[endpoint.id] >= GOOD_SERVICE:
            for node in nodes:
                self.crashes.succeeded(node)

    def _note_lost(self, changed: Iterable[_Summary], now: float) -> None:
        """Note deployments lost with their head, however soon the head is back without them."""
        for node in self._departed & self._answering.keys():
            for endpoint in self._answering.pop(node):
                self._lost[endpoint.id] = endpoint, now + BACK_WITHIN
        for summary in changed:
            if not summary.record.draining:
                self._answering[summary.record.node] = tuple(
                    e for e in summary.endpoints if e.state is State.READY and not e.closing
                )
        if not self._lost:
            return
        serving = {
            (e.digest, e.template)
            for summary in self._summaries.values()
            for e in summary.record.endpoints
            if e.state is State.READY
        }
        self._lost = {
            key: (endpoint, until)
            for key, (endpoint, until) in self._lost.items()
            if now < until and key not in self._gone and (endpoint.digest, endpoint.template) not in serving
        }

    def _note_ends(self, now: float) -> None:
        """Note since when ended deployments still hold memory."""
        summaries = self._summaries.values()
        held = frozenset[str]().union(*(summary.granted for summary in summaries))
        ended = held.difference(self._accepted, *(summary.alive for summary in summaries))
        self._ended_at = {deployment: self._ended_at.get(deployment, now) for deployment in ended}

    def _forget(self, present: Collection[str], now: float) -> None:
        for deployment, entry in list(self._accepted.items()):
            if now >= entry.until or (entry.seen and deployment not in present):
                del self._accepted[deployment]
        self._gone = {key: until for key, until in self._gone.items() if now < until}
        self._unwilling = {key: until for key, until in self._unwilling.items() if now < until}
        self._truth = {key: value for key, value in self._truth.items() if now < value[1]}
        self._pooled = {key: until for key, until in self._pooled.items() if now < until}
        self._unreachable = {key: until for key, until in self._unreachable.items() if now < until}

    def forget(self, *names: str) -> None:
        """Forget lost deployments of these names (of models or deployments): they are being unloaded."""
        self._lost = {
            key: (endpoint, until)
            for key, (endpoint, until) in self._lost.items()
            if not {endpoint.model, endpoint.id} & set(names)
        }

    # Queries

    def accepted(self) -> tuple[AcceptedDeployment, ...]:
        """Return deployments that the records may not show yet, with the bytes they do not show."""
        return tuple(
            replace(
                entry.deployment,
                bytes={
                    key: size for key, size in entry.deployment.bytes.items() if key[0] not in entry.shown
                },
            )
            for entry in self._accepted.values()
        )

    def expected(self, now: float) -> tuple[Record, ...]:
        """Return the nodes that left recently and should be back, as they will then be."""
        return self._absences.expected(now)

    def added_to(
        self, snapshot: ClusterSnapshot, digest: str, now: float, excluded: Mapping[str, str]
    ) -> ClusterSnapshot:
        """Add all that is known here to ``snapshot``, made for the model with this digest.

        ``excluded``: further nodes to leave out, and why.
        """
        records = snapshot.records
        blocked = self._left_out(records, digest, now)
        brief = {node for node, block in blocked.items() if block.seconds <= BACK_WITHIN}
        fallback = {node for node, block in blocked.items() if block.since >= LAST_RESORT}
        avoided = {
            record.node: "this model recently failed to load there"
            for record in records
            if self.loads.known((record.node, digest), now, least=_AVOIDED)
        }
        for record in records:
            if (block := self.crashes.blocked(record.node, now)) is not None:
                avoided[record.node] = why_blocked(block)
        return replace(
            snapshot,
            accepted=self.accepted(),
            gone=frozenset(self._gone),
            returning=frozenset(key for key, time in self._ended_at.items() if now - time < RETURNED_WITHIN),
            unwilling=frozenset(self._unwilling),
            out={**{node: why_blocked(block) for node, block in blocked.items()}, **excluded},
            pooled=frozenset(self._pooled),
            truth={key: size for key, (size, _) in self._truth.items()},
            blocked=self.models.blocked(digest, now),
            avoided=avoided,
            passing=frozenset((brief | self._unreachable.keys()) - (blocked.keys() - brief)),
            last_resort=frozenset(fallback - self._unreachable.keys() - excluded.keys()),
            expected=self.expected(now),
            absent=self._absences.absent(now),
            departed=self._departed,
            lost=tuple(endpoint for endpoint, _ in self._lost.values()),
        )

    def _left_out(self, records: Iterable[Record], digest: str, now: float) -> dict[str, Blocked]:
        """Return the nodes that failed too often recently, with any model or with this one."""
        found = {}
        for record in records:
            blocked = self.nodes.blocked(record.node, now)
            if blocked is None:
                blocked = self.loads.blocked((record.node, digest), now)
            if blocked is not None:
                found[record.node] = blocked
        return found
