"""Holds all that a decision is based on: the records, and what was ordered since they were written."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field, replace

from sollold.cluster.gossip.record import Backend, Endpoint, Grant, GrantState, Record, State
from sollold.facts import dataclass
from sollold.leader.backoff import Blocked
from sollold.machine.external_worker import external_address
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from sollold.models.templates.jinja import fingerprint
from sollold.placement import cost_model
from sollold.placement.explain import Away
from sollold.placement.inventory import Fleet, LeftOut, Machine, each_worker_once, machine_of, worker_key
from sollold.placement.plan import Plan
from sollold.placement.speculation import Drafter, MeasuredDrafts, nothing_measured
from sollold.settings.schema import Settings
from sollold.units import seconds_text

Bytes = Mapping[tuple[str, str], int]
"""Bytes by (node, device)."""


@dataclass(frozen=True, slots=True)
class AcceptedDeployment:
    """A deployment that its head has accepted; the records may not show it yet."""

    deployment: str
    plan: Plan
    bytes: Bytes


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The cluster at one moment, as seen by one model's placement.

    Attributes:
        records: records of the live nodes.
        holders: (node, the model as that node has it).
        shape: the model's header; None if it could not be read.
        unread: why it could not be read.
        accepted: deployments that the records may not show yet, with the bytes they do not show.
        gone: ended deployments that the records may still show.
        returning: deployments that have just ended; their memory will be free in a moment.
        unwilling: deployments that have just refused to be unloaded.
        out: nodes that take no part now, with the reason.
        pooled: nodes whose devices turned out to share one limit.
        truth: available bytes that an owner reported after its record was written.
        blocked: set if the model has failed too often.
        avoided: nodes used only if others will not do, with the reason.
        passing: nodes of ``out`` that will be asked again within a minute.
        last_resort: nodes of ``out`` to fall back on if no others will do.
        expected: nodes that have just gone and should be back, as they will then be.
        absent: nodes that went earlier, as they would be if started, and the seconds since.
        departed: nodes that were online a moment ago and have left or died.
        lost: deployments that served until their head went a moment ago.
        unfetched: nodes that recently failed to fetch the model's file.
        correction: correction of the devices' speeds for the model's architecture.
        drafters: by speculation setting: the models that could draft for this one, and why a named one is not
            among them.
        draft_stats: measured drafts for the model.
        smaller: sizes in bytes of the model's smaller quantizations, by name.
    """

    records: tuple[Record, ...]
    holders: tuple[tuple[str, Model], ...]
    shape: Shape | None
    settings: Settings
    unread: str = ""
    accepted: tuple[AcceptedDeployment, ...] = ()
    gone: frozenset[str] = frozenset()
    returning: frozenset[str] = frozenset()
    unwilling: frozenset[str] = frozenset()
    out: Mapping[str, str] = field(default_factory=dict)
    pooled: frozenset[str] = frozenset()
    truth: Bytes = field(default_factory=dict)
    blocked: Blocked | None = None
    avoided: Mapping[str, str] = field(default_factory=dict)
    passing: frozenset[str] = frozenset()
    last_resort: frozenset[str] = frozenset()
    expected: tuple[Record, ...] = ()
    absent: tuple[tuple[Record, float], ...] = ()
    departed: frozenset[str] = frozenset()
    lost: tuple[Endpoint, ...] = ()
    unfetched: frozenset[str] = frozenset()
    correction: cost_model.Correction = cost_model.uncorrected
    drafters: Mapping[str, tuple[tuple[Drafter, ...], str]] = field(default_factory=dict)
    draft_stats: MeasuredDrafts = nothing_measured
    smaller: Mapping[str, int] = field(default_factory=dict)

    def endpoints(self) -> list[tuple[Record, Endpoint]]:
        """Return every endpoint on a live node, except those that have just been ended."""
        return [(r, e) for r in self.records for e in r.endpoints if e.id not in self.gone]

    def held(self, record: Record, endpoint: Endpoint) -> dict[tuple[str, str], int]:
        """Return the bytes that a deployment, or a model in Ollama, would free if it ended."""
        held = Counter[tuple[str, str]]()
        if endpoint.backend is Backend.OLLAMA:
            for placed in endpoint.placed:
                held[placed.node, placed.device] += placed.freed
            return held
        for owner in self.records:
            for grant in owner.grants:
                if grant.deployment == endpoint.id:
                    held[owner.node, grant.device] += grant.bytes
        return held

    def ending(self, lately: bool = False) -> dict[tuple[str, str], int]:
        """Return the bytes of deployments that have ended or are ending; their owners soon release them.

        A reservation counts as well: if the leader that made it is gone, it expires.

        ``lately``: only of those that ended a moment ago.
        """
        # Deployments in use on a draining node end, or become idle, within the drain limit.
        leaving = {e.id for r, e in self.endpoints() if e.closing or (r.draining and in_use(e))}
        alive = {e.id for _, e in self.endpoints() if e.state is not State.FAILED}
        nodes = {record.node for record in self.records}
        alive |= {entry.deployment for entry in self.accepted if entry.plan.head in nodes} | self.gone
        alive -= leaving
        held = Counter[tuple[str, str]]()
        for entry in self.accepted:
            if entry.plan.head not in nodes and not lately:
                held.update(entry.bytes)
        for record in self.records:
            for grant in record.grants:
                if grant.deployment in alive and not self._outlasts(record.node, grant):
                    continue
                committed = grant.state is GrantState.COMMITTED
                if not lately or (committed and grant.deployment in self.returning):
                    held[record.node, grant.device] += grant.bytes
        return held

    def _outlasts(self, node: str, grant: Grant) -> bool:
        """Return whether an owner has reported its free memory since the deployment of a grant ended.

        Then that report shows whether the memory of the grant is free. An end clears all earlier reports.
        """
        return grant.deployment in self.gone and (node, grant.device) in self.truth

    def orphans(self) -> list[tuple[str, str, str]]:
        """Return (node, deployment, head) of committed grants whose head has left the cluster or failed."""
        found = {
            (record.node, grant.deployment, grant.head)
            for record in self.records
            for grant in record.grants
            if grant.head in self.departed and grant.state is GrantState.COMMITTED
        }
        return sorted(found)

    def fleet(
        self,
        build: str,
        freed: Collection[tuple[Record, Endpoint]] = (),
        *,
        later: Bytes | None = None,
        anywhere: bool = False,
    ) -> Fleet:
        """Return the machines of one llama.cpp build, with the memory of ``freed`` released.

        ``later``: further bytes to count as released. ``anywhere``: treat machines that could fetch the file
        as having it.
        """
        give: defaultdict[str, Counter[str]] = defaultdict(Counter)
        take: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for record, endpoint in freed:
            _add(give, self.held(record, endpoint))
        for record in self.records:
            for grant in record.grants:
                if grant.deployment in self.gone and not self._outlasts(record.node, grant):
                    give[record.node][grant.device] += grant.bytes
        for accepted in self.accepted:
            _add(take, accepted.bytes)
        if later:
            _add(give, later)
        machines: list[Machine] = []
        left_out: list[LeftOut] = []
        have = {node: model for node, model in self.holders if runs_on_llama(model)}
        for record in self.records:
            reason = self._why_out(record, build)
            if reason:
                left_out.append(LeftOut(record.node, record.name, reason))
                continue
            machines.append(
                machine_of(
                    self._updated(record),
                    holds=record.node in have or (anywhere and record.node not in self.unfetched),
                    spare=self.settings.placement.spare,
                    freed=give.get(record.node),
                    taken=take.get(record.node),
                    one_pool=record.node in self.pooled,
                    digest=self.holders[0][1].digest,
                    copy=have[record.node].size if record.node in have else 0,
                )
            )
        return Fleet(each_worker_once(machines, self._worker_users()), tuple(left_out))

    def _worker_users(self) -> dict[str, str]:
        """Return the external workers in use: `worker_key` → the node that granted them."""
        granted = {(record.node, grant.device) for record in self.records for grant in record.grants}
        granted |= {key for accepted in self.accepted for key in accepted.bytes}
        return {
            worker_key(node, address): node
            for node, device in sorted(granted)
            if (address := external_address(device))
        }

    def with_absent_nodes(self) -> ClusterSnapshot | None:
        """Return the snapshot as if all nodes that left recently were back; None when none is missing."""
        back = {record.node for record in self.expected}
        if not back and not self.passing & self.out.keys():
            return None
        return replace(
            self,
            records=(*(record for record in self.records if record.node not in back), *self.expected),
            # Deployments end with their head.
            accepted=tuple(accepted for accepted in self.accepted if accepted.plan.head not in back),
            out={node: why for node, why in self.out.items() if node not in self.passing},
            truth={key: size for key, size in self.truth.items() if key[0] not in back},
            avoided={},
            passing=frozenset(),
            expected=(),
        )

    def why_awaited(self, node: str) -> str:
        """Return why an awaited node takes no part, as a clause."""
        if any(record.node == node and record.draining for record in self.records):
            return "it is draining"
        return self.out.get(node, "it has just gone offline")

    def away(self, build: str) -> tuple[Away, ...]:
        """Return the machines that a person could make take part again, and how."""
        have = {node for node, model in self.holders if runs_on_llama(model)}
        spare = self.settings.placement.spare
        found = []
        for record in self.records:
            if record.draining and record.build == build:
                found.append((record, f"`sollold undrain {shlex.quote(record.name)}`: it is draining"))
            elif record.build and record.build != build:
                how = f"llama.cpp {build} on {record.name}, as on the others: it has {record.build}"
                found.append((record, how))
        for record, seconds in self.absent:
            if record.build == build:
                how = f"starting {record.name} again: it has been offline for {seconds_text(seconds)}"
                found.append((record, how))
        return tuple(Away(machine_of(r, holds=r.node in have, spare=spare), how) for r, how in found)

    def builds(self) -> list[str]:
        """Return the llama.cpp builds on nodes that have the model, the most common first."""
        have = {node for node, model in self.holders if runs_on_llama(model)}
        builds = {r.build for r in self.records if r.node in have and r.build}
        return sorted(builds, key=lambda build: (-sum(r.build == build for r in self.records), build))

    def _why_out(self, record: Record, build: str) -> str:
        if record.draining:
            return "it is draining"
        if record.node in self.out:
            return self.out[record.node]
        if record.node in self.avoided:
            return self.avoided[record.node]
        if not record.build:
            return f"it has no llama.cpp yet ({record.setup or 'being set up'})"
        if record.build != build:
            return f"it has llama.cpp {record.build}, and the others {build}"
        return ""

    def _updated(self, record: Record) -> Record:
        """Return the record, updated with the bytes its owner has reported since."""
        if not any((record.node, device.id) in self.truth for device in record.devices):
            return record
        devices = tuple(
            replace(device, available=self.truth.get((record.node, device.id), device.available))
            for device in record.devices
        )
        return replace(record, devices=devices)


def unloaded(snapshot: ClusterSnapshot) -> ClusterSnapshot:
    """Return the snapshot as if the model ran nowhere (Ollama aside) and its memory were free."""
    model = snapshot.holders[0][1]
    same = (model.digest, fingerprint(model.template))
    ids = {
        endpoint.id
        for _, endpoint in snapshot.endpoints()
        if (endpoint.digest, endpoint.template) == same and endpoint.backend is not Backend.OLLAMA
    }
    kept = tuple(
        entry for entry in snapshot.accepted if (entry.plan.digest, fingerprint(entry.plan.template)) != same
    )
    return replace(snapshot, gone=snapshot.gone | ids, accepted=kept)


def runs_on_llama(model: Model) -> bool:
    """Return whether a node could run this model with llama.cpp."""
    return bool(model.files) and not model.unusable and not model.only_ollama


def with_refusals(
    holders: tuple[tuple[str, Model], ...], records: Iterable[Record]
) -> tuple[tuple[str, Model], ...]:
    """Mark the model as unreadable on every holder whose llama.cpp build failed to read it on one of them.

    The file is the same everywhere, so every node with that build would fail in the same way.
    """
    builds = {record.node: record.build for record in records if record.build}
    refused = {
        builds[node]: model.only_ollama
        for node, model in holders
        # If the files are missing, the content is not to blame.
        if model.only_ollama and model.files and node in builds
    }
    return tuple(
        (node, replace(model, only_ollama=refused[builds[node]]))
        if not model.only_ollama and builds.get(node) in refused
        else (node, model)
        for node, model in holders
    )


def why_blocked(blocked: Blocked) -> str:
    """Describe a backoff in a clause."""
    return (
        f"it failed {blocked.failures} times in a row, last: "
        f"{blocked.reason.rstrip('.')}; next try in {seconds_text(blocked.seconds)}"
    )


def in_use(endpoint: Endpoint) -> bool:
    """Return whether the endpoint has active or waiting requests."""
    return endpoint.active > 0 or endpoint.waiting > 0


def is_loading(endpoint: Endpoint) -> bool:
    """Return whether the endpoint is starting or loading."""
    return endpoint.state in (State.STARTING, State.LOADING)


def loaded_of(records: Iterable[Record], deployment: str, model: str) -> tuple[tuple[str, str], ...]:
    """Return (node, id) of what can be unloaded: the deployment with this id, or all of this model's name.

    The same content under another name is not included: its callers may still want it.
    """
    return tuple(
        (record.node, endpoint.id)
        for record in records
        for endpoint in record.endpoints
        if endpoint.state is not State.FAILED
        and (endpoint.loaded or endpoint.backend is not Backend.OLLAMA)
        and (endpoint.id == deployment or endpoint.model.lower() == model.lower())
    )


def _add(table: defaultdict[str, Counter[str]], held: Bytes) -> None:
    for (node, device), size in held.items():
        table[node][device] += size
