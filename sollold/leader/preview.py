"""Presents a decision to users: placement, free memory, rejected alternatives and missing memory."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from sollold.cluster.gossip.record import Record
from sollold.facts import dataclass
from sollold.leader.decision import Decision, FetchFirst, HoldersAway, Place, PlaceLater, Refuse
from sollold.leader.existing import Mismatch, ReloadWhenIdle, Use, Wait
from sollold.leader.messages import Verdict
from sollold.leader.snapshot import ClusterSnapshot
from sollold.machine.device import Kind
from sollold.placement.explain import Shortfall
from sollold.placement.inventory import Machine, machine_of
from sollold.placement.plan import Plan
from sollold.placement.request import memory_needed, must_shard
from sollold.placement.search import Alternative, describe
from sollold.settings.schema import ModelProfile, Settings
from sollold.units import bytes_text


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """Available bytes of a device before and after a plan."""

    node: str
    name: str
    device: str
    total: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """What loading a model would do.

    Attributes:
        ok: whether a request could be served; ``message`` says how, or why not.
        verdict: the leader's verdict now.
        node: the node that serves it already, or else the plan's head.
        endpoint: the endpoint that serves it already, if any.
        plan: the plan that would be carried out; None when there is none.
        evicts: (deployment, model) pairs that would be unloaded.
        prompt_tokens_per_second: prediction; 0.0 when unknown.
        context: tokens that a request could use.
        weights, state, compute, overhead: bytes over all devices.
        free: memory before and after on each device that the plan uses.
        options: rejected alternatives, the fastest first.
        missing: how much memory is missing, when the model does not fit.
    """

    ok: bool
    verdict: Verdict
    message: str
    node: str = ""
    endpoint: str = ""
    plan: Plan | None = None
    evicts: tuple[tuple[str, str], ...] = ()
    prompt_tokens_per_second: float = 0.0
    context: int = 0
    weights: int = 0
    state: int = 0
    compute: int = 0
    overhead: int = 0
    free: tuple[MemoryChange, ...] = ()
    options: tuple[Alternative, ...] = ()
    missing: Shortfall | None = None
    estimate: bool = False


def preview_of(
    decision: Decision, snapshot: ClusterSnapshot | None, fresh: Decision | None = None
) -> PlanPreview:
    """Return the preview of a decision.

    Args:
        decision: the leader's decision now.
        snapshot: the snapshot that it, or ``fresh``, is based on; None when the model was not found.
        fresh: the decision if the model were not loaded, when ``decision`` is not to place it.
    """
    match decision:
        case Place():
            return _placed(decision, snapshot, Verdict.WAIT, f"It would run on {_location(decision)}.")
        case PlaceLater(place, message):
            return _placed(place, snapshot, Verdict.PLANNING, message)
        case FetchFirst(place, _, _, message):
            # The message is also one of the plan's reasons; show it once.
            reasons = tuple(reason for reason in place.plan.reasons if reason != message)
            place = replace(place, plan=replace(place.plan, reasons=reasons))
            return _placed(place, snapshot, Verdict.PLANNING, message)
        case Use(endpoint, node, reason):
            message = f"{endpoint} on {_name(snapshot, node)} answers: {reason}."
            return _with_plan(fresh, snapshot, Verdict.USE, message, node, endpoint)
        case Wait(deployment, head):
            message = f"{deployment} is being loaded by {_name(snapshot, head)}."
            return _with_plan(fresh, snapshot, Verdict.WAIT, message, head, deployment)
        case Mismatch(endpoint, node, message):
            return _with_plan(fresh, snapshot, Verdict.REFUSED, message + ".", node, endpoint)
        case ReloadWhenIdle(endpoint, node, message):
            words = f"{message}; it is reloaded when it is idle."
            return _with_plan(fresh, snapshot, Verdict.PLANNING, words, node, endpoint)
        case HoldersAway(message):
            return PlanPreview(ok=False, verdict=Verdict.PLANNING, message=message)
        case Refuse():
            return PlanPreview(
                ok=False,
                verdict=Verdict.REFUSED,
                message=decision.message,
                options=decision.alternatives,
                missing=decision.shortfall,
            )


def _with_plan(
    fresh: Decision | None,
    snapshot: ClusterSnapshot | None,
    verdict: Verdict,
    message: str,
    node: str,
    endpoint: str,
) -> PlanPreview:
    if isinstance(fresh, Place):
        return _placed(fresh, snapshot, verdict, message, node, endpoint)
    return PlanPreview(ok=True, verdict=verdict, message=message, node=node, endpoint=endpoint)


def _placed(
    place: Place,
    snapshot: ClusterSnapshot | None,
    verdict: Verdict,
    message: str,
    node: str = "",
    endpoint: str = "",
) -> PlanPreview:
    plan, choice = place.plan, place.choice
    shares = (plan.host, *plan.shares)
    candidate = choice.candidate
    prompt = candidate.prompt_seconds if candidate is not None else 0.0
    return PlanPreview(
        ok=True,
        verdict=verdict,
        message=message,
        node=node or plan.head,
        endpoint=endpoint,
        plan=plan,
        evicts=tuple((deployment, model) for _, deployment, model in place.evictions),
        prompt_tokens_per_second=1 / prompt if prompt > 0 else 0.0,
        context=plan.run.request_context,
        weights=sum(share.weights for share in shares),
        state=sum(share.state for share in shares),
        compute=sum(share.compute for share in shares),
        overhead=sum(share.overhead for share in shares),
        free=tuple(_free(place, snapshot)),
        options=choice.alternatives,
        estimate=choice.footprint.estimate,
    )


def _location(place: Place) -> str:
    candidate = place.choice.candidate
    return describe(candidate, place.fleet) if candidate is not None else place.plan.head


def _free(place: Place, snapshot: ClusterSnapshot | None) -> Iterable[MemoryChange]:
    released = Counter[tuple[str, str]]()
    if snapshot is not None:
        victims = {deployment for _, deployment, _ in place.evictions}
        for record, endpoint in snapshot.endpoints():
            if endpoint.id in victims:
                released.update(snapshot.held(record, endpoint))
        for record in snapshot.records:
            for grant in record.grants:
                if grant.deployment in snapshot.gone:
                    released[record.node, grant.device] += grant.bytes
    known = (*snapshot.expected, *snapshot.records) if snapshot is not None else ()
    records = {record.node: record for record in known}
    for node, devices in place.plan.bytes_by_owner().items():
        owner = records.get(node)
        if owner is None:
            continue
        for device in owner.devices:
            if device.id in devices:
                before = device.available + released[node, device.id]
                after = max(0, before - devices[device.id])
                yield MemoryChange(node, owner.name, device.id, device.total, before, after)


def _name(snapshot: ClusterSnapshot | None, node: str) -> str:
    for record in snapshot.records if snapshot is not None else ():
        if record.node == node:
            return record.name
    return node


def outline_from_profile(
    name: str, profile: ModelProfile, records: Iterable[Record], settings: Settings
) -> PlanPreview:
    """Outline a plan from a profile alone: which machines, but not which layers, which needs the file."""
    placement = settings.placement
    need = memory_needed(profile)
    size = f"about {bytes_text(need)}" if not profile.memory else bytes_text(need)
    words = f"{profile.parameters:g} billion weights, {size}" if profile.parameters else size
    intro = f"No node has the file of {name} yet. By its profile ({words}) "
    machines = [
        machine_of(record, holds=True, spare=placement.spare) for record in records if not record.draining
    ]
    machines.sort(key=lambda machine: (-machine.room, machine.name))
    spread = placement.enable_distributed and (
        profile.requires_distributed or must_shard(placement, int(profile.parameters * 1e9))
    )
    alone = max(machines, key=lambda machine: (_own_room(machine), machine.name), default=None)
    if not spread and alone is not None and _own_room(alone) >= need:
        how = f"fetch it there (`sollold pull {shlex.quote(name)}`)"
        return _outline(True, f"{intro}{alone.name} could hold it alone: {how}.")
    if placement.enable_distributed:
        chosen: list[Machine] = []
        for machine in machines[: placement.max_workers + 1]:
            if sum(picked.room for picked in chosen) >= need and len(chosen) >= (2 if spread else 1):
                break
            chosen.append(machine)
        if sum(picked.room for picked in chosen) >= need and (len(chosen) > 1 or not spread):
            names = ", ".join(picked.name for picked in chosen)
            why = "no machine can hold it alone" if not spread else "the settings require it"
            return _outline(True, f"{intro}it would be spread over {names}, since {why}. Fetch it on one.")
    available = sum(machine.room for machine in machines) if placement.enable_distributed else 0
    available = available or (_own_room(alone) if alone is not None else 0)
    if need > available:
        end = f"it does not fit: {bytes_text(available)} available, {bytes_text(need - available)} missing."
    else:
        end = "it does not fit: the settings require it to be spread, and there is no other machine."
    remedies = ("a smaller quantization of the model",)
    missing = Shortfall(need, available, max(0, need - available), need, 0, 0, remedies, intro + end)
    return _outline(False, intro + end, missing)


def _outline(ok: bool, message: str, missing: Shortfall | None = None) -> PlanPreview:
    return PlanPreview(ok=ok, verdict=Verdict.REFUSED, message=message, missing=missing, estimate=True)


def _own_room(machine: Machine) -> int:
    external = sum(capacity.room for capacity in machine.devices if capacity.kind is Kind.EXTERNAL)
    return machine.room - external
