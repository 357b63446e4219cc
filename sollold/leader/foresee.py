"""Where a model would run whose file no node has yet, from what the settings say of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.record import Record
from sollold.config import ModelProfile, Settings
from sollold.leader.ensure import Missing, PlanPreview, Verdict
from sollold.machine.device import Kind
from sollold.placement.fleet import Machine, machine_of
from sollold.placement.profile import needed
from sollold.placement.wish import must_shard
from sollold.units import bytes_text


def foresee(name: str, profile: ModelProfile, records: Iterable[Record], settings: Settings) -> PlanPreview:
    """A plan's outline: which machines, not which layers, since those stand in the file."""
    placement = settings.placement
    need = needed(profile)
    size = f"about {bytes_text(need)}" if not profile.memory else bytes_text(need)
    words = f"{profile.parameters:g} billion weights, {size}" if profile.parameters else size
    begin = f"No node has the file of {name} yet. By its profile ({words}) "
    machines = [
        machine_of(record, holds=True, spare=placement.spare) for record in records if not record.draining
    ]
    machines.sort(key=lambda one: (-one.room, one.name))
    apart = placement.enable_distributed and (
        profile.requires_distributed or must_shard(placement, int(profile.parameters * 1e9))
    )
    alone = max(machines, key=lambda one: (_own_room(one), one.name), default=None)
    if not apart and alone is not None and _own_room(alone) >= need:
        return _outline(
            True, f"{begin}{alone.name} would hold it alone: fetch it there (`sollold pull {name}`)."
        )
    if placement.enable_distributed:
        chosen: list[Machine] = []
        for machine in machines[: placement.max_workers + 1]:
            if sum(one.room for one in chosen) >= need and len(chosen) >= (2 if apart else 1):
                break
            chosen.append(machine)
        if sum(one.room for one in chosen) >= need and (len(chosen) > 1 or not apart):
            names = ", ".join(one.name for one in chosen)
            why = "no machine holds it alone" if not apart else "the settings want it so"
            return _outline(True, f"{begin}it would be spread over {names}, since {why}. Fetch it on one.")
    there = sum(one.room for one in machines) if placement.enable_distributed else 0
    there = there or (_own_room(alone) if alone is not None else 0)
    if need > there:
        end = f"it does not fit: {bytes_text(there)} are there, {bytes_text(need - there)} are missing."
    else:
        end = "it does not fit: the settings want it spread, and there is no other machine."
    missing = Missing(need, there, max(0, need - there), need, 0, 0, ("a smaller quantization of the model",))
    return _outline(False, begin + end, missing)


def _outline(ok: bool, message: str, missing: Missing | None = None) -> PlanPreview:
    return PlanPreview(ok=ok, verdict=Verdict.REFUSED, message=message, missing=missing, estimate=True)


def _own_room(machine: Machine) -> int:
    plain = sum(spot.room for spot in machine.spots if spot.kind is Kind.PLAIN)
    return machine.room - plain
