"""Explains why a model does not fit, in numbers, with the cheapest remedies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType

from sollold.facts import dataclass
from sollold.models.footprint.footprint import Footprint
from sollold.models.gguf.tensor_types import by_name
from sollold.placement import context, cost_model
from sollold.placement.evaluate import Candidate
from sollold.placement.inventory import DeviceCapacity, Fleet, Machine
from sollold.placement.missing_memory import (
    additional_machine,
    buffers_on_fewest,
    largest_file,
    missing_on,
    usable,
)
from sollold.placement.planner import FootprintOf, PlacementChoice, choose
from sollold.placement.request import MOST_DEVICES, PlacementRequest, Policy
from sollold.settings.schema import GIB, MIB
from sollold.units import bytes_text

LEAST_HELD_BACK = 64 * MIB
"""Minimum bytes that a node must hold back for a remedy to mention it."""
_MAX_AWAY = 8
"""Machines that are tried together, of those that take no part."""
_WIDER_THAN_Q8 = {"f32", "f16", "bf16"}
_Q8_BLOCK = by_name("q8_0").block


@dataclass(frozen=True, slots=True)
class Busy:
    """A deployment that may not be evicted now; ``bytes``: what it holds, by (node, device)."""

    model: str
    bytes: Mapping[tuple[str, str], int]
    reason: str


@dataclass(frozen=True, slots=True)
class Away:
    """A machine that takes no part but could; ``how``: what to do for that, and why it takes no part."""

    machine: Machine
    how: str


@dataclass(frozen=True, slots=True)
class Shortfall:
    """How much memory is missing, in bytes.

    Attributes:
        needed: weights, state and buffers over all devices, at the smallest context that would be given.
        there: room on the machines that may take part together.
        buffers: compute buffers and processes, and room that is in pieces too small for a layer.
        missing: ``needed - there``; 0 when the total suffices, but the parts fit no devices.
        remedies: what would help, the cheapest first, as phrases.
        message: everything in words, for the caller.
    """

    needed: int
    there: int
    missing: int
    weights: int
    state: int
    buffers: int
    remedies: tuple[str, ...]
    message: str


def explain(
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: FootprintOf,
    choice: PlacementChoice,
    busy: Sequence[Busy] = (),
    correction: cost_model.Correction = cost_model.uncorrected,
    away: Sequence[Away] = (),
    smaller: Mapping[str, int] = MappingProxyType({}),
) -> Shortfall:
    """Work out what is missing after `choose` found no placement, and try what would help.

    ``smaller``: sizes in bytes of the model's smaller quantizations that the cluster has, by name.
    """
    footprint = choice.footprint
    heads = [machine for machine in fleet.machines if machine.holds]
    weights = footprint.host_weights + sum(footprint.weights)
    state = sum(footprint.state)
    capacities = [capacity for machine in fleet.machines for capacity in machine.devices if capacity.room > 0]
    alone = max(heads, key=lambda machine: machine.room, default=None)
    buffers = buffers_on_fewest(footprint, heads, capacities)
    needed = weights + state + buffers
    room = sum(machine.room for machine in usable(request, fleet, alone))
    missing = max(0, needed - room)

    # Bytes of the room that are of no use, since they are in pieces too small for a layer.
    pieces = 0

    def fits_on(trial: Fleet) -> bool:
        return choose(request, trial, footprint_of, correction).candidate is not None

    if missing and alone and (exact := missing_on(alone, fleet, missing, weights + needed, fits_on)):
        missing, needed, estimate = exact, room + exact, needed
        pieces = max(0, needed - estimate)
        weights = min(weights, needed - state)
        buffers = needed - weights - state
    remedies = tuple(
        _remedies(request, fleet, footprint_of, footprint, busy, correction, missing, away, smaller)
    )
    min_context = context.tokens(request, footprint.context_train)
    if not request.context:
        min_context = min(min_context, context.LEAST)
    setting = f"with {min_context} tokens of context for one request at a time"
    parts = [
        f"{request.model} does not fit. It needs {bytes_text(needed)} {setting} "
        f"(weights {bytes_text(weights)}, context {bytes_text(state)}, buffers {bytes_text(buffers - pieces)}"
        + (f", room too small for a layer {bytes_text(pieces)})." if pieces > LEAST_HELD_BACK else ")."),
        _available(fleet, request, room),
    ]
    if missing:
        parts.append(f"Missing: {bytes_text(missing)}.")
    elif not heads:
        parts.append("No machine that has the file can take part.")
    elif request.fixed:
        parts.append(f"The layers can't be placed as named{_closest(choice)}.")
    else:
        parts.append(
            "Total memory suffices but is fragmented: each layer must fit whole on one device, with that "
            "device's buffers" + _closest(choice) + "."
        )
    if remedies:
        parts.append("What would help: " + "; ".join(remedies) + ".")
    parts += [f"{machine.name} is left out: {machine.reason}." for machine in fleet.left_out[:5]]
    return Shortfall(needed, room, missing, weights, state, buffers, remedies, " ".join(parts))


def _available(fleet: Fleet, request: PlacementRequest, total: int) -> str:
    rows = []
    for machine in fleet.machines:
        room = machine.room
        devices = ", ".join(
            f"{capacity.device} {bytes_text(capacity.room)}"
            for capacity in machine.devices
            if len(machine.devices) > 1
        )
        rows.append((room, f"{machine.name} {bytes_text(room)}" + (f" ({devices})" if devices else "")))
    rows.sort(key=lambda row: -row[0])
    listed = ", ".join(text for _, text in rows[:8])
    if len(rows) > 8:
        listed += f" and {len(rows) - 8} more"
    restriction = "" if request.distributed else ", and models are not spread over machines here"
    if request.distributed and len(rows) > request.workers + 1:
        restriction = f", at most {request.workers + 1} machines together"
    return f"There is room for {bytes_text(total)}: {listed or 'no machine'}{restriction}."


def _closest(choice: PlacementChoice) -> str:
    alternative = next((a for a in choice.alternatives if a.tokens_per_second == 0.0), None)
    return f" ({alternative.what}: {alternative.reason})" if alternative is not None else ""


def _remedies(
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: FootprintOf,
    footprint: Footprint,
    busy: Sequence[Busy],
    correction: cost_model.Correction,
    missing: int,
    away: Sequence[Away],
    smaller: Mapping[str, int],
) -> list[str]:
    """Return what would help, each tried: phrases, the cheapest first."""

    def fits(
        attempt: PlacementRequest, trial: Fleet = fleet, footprint_with: FootprintOf = footprint_of
    ) -> Candidate | None:
        return choose(attempt, trial, footprint_with, correction).candidate

    found = _settings_remedies(request, fits, quantized_cache=not footprint.head_size % _Q8_BLOCK)

    def fits_on(trial: Fleet) -> bool:
        return fits(request, trial) is not None

    if limits := _limit_remedy(fleet, fits_on):
        found.append(limits)
    if limits := _group_remedy(fleet, fits_on):
        found.append(limits)
    for group in _release_remedies(request, fleet, busy, fits_on):
        sizes = [bytes_text(sum(part.bytes.values())) for part in group]
        held = [
            f"{part.model}, which holds {size} ({part.reason})"
            for part, size in zip(group, sizes, strict=True)
        ]
        found.append("unloading " + " and ".join(held))
    found += _machine_remedies(fleet, away, fits_on)
    found += filter(None, (_programs_remedy(fleet, fits_on), _reserve_remedy(fleet, fits_on)))
    if size := largest_file(request, footprint, lambda f: fits(request, fleet, f(footprint_of)) is not None):
        present = max(
            (n for n, other in smaller.items() if other <= size), key=smaller.__getitem__, default=""
        )
        named = f"{present}, which is here, or another" if present else "a"
        found.append(f"a smaller quantization of the model: {named} file of at most {bytes_text(size)}")
    if request.distributed and not request.fixed:
        size = additional_machine(request, fleet, footprint, missing, fits_with=fits_on)
        if size:
            found.append(f"another machine with {size // GIB} GiB of free memory")
    if not found:
        found.append("a smaller model")
    return found


def _settings_remedies(
    request: PlacementRequest,
    fits: Callable[[PlacementRequest], Candidate | None],
    *,
    quantized_cache: bool,
) -> list[str]:
    """Return the changes to the request or settings that help: each alone, or else the fewest together.

    ``quantized_cache``: whether llama.cpp can quantize the model's KV cache.
    """
    changes: list[dict[str, object]] = []
    if request.context > context.LEAST:
        changes.append({"context": 0, "usual": request.context})
    if quantized_cache and {request.type_k, request.type_v} & _WIDER_THAN_Q8:
        changes.append(dict.fromkeys(("type_k", "type_v"), "q8_0"))
    if not request.distributed:
        changes.append({"distributed": True})
    elif request.workers < MOST_DEVICES:
        changes.append({"workers": MOST_DEVICES})
    if request.fixed:
        changes.append({"fixed": ()})
    elif request.policy is not Policy.FASTEST:
        changes.append({"policy": Policy.FASTEST})
    for count in range(1, len(changes) + 1):
        found = []
        for subset in combinations(changes, count):
            changed = replace(request, **{name: value for change in subset for name, value in change.items()})  # type: ignore[arg-type]
            candidate = fits(changed)
            if candidate is not None:
                found.append(" with ".join(_setting(change, request, candidate) for change in subset))
        if found:
            return found
    return []


def _setting(change: dict[str, object], request: PlacementRequest, candidate: Candidate) -> str:
    if "context" in change:
        tokens = f"{candidate.run.request_context} tokens instead of {request.context}"
        return f"a context of {tokens} (num_ctx, or `--context`)"
    if "type_k" in change:
        return "a KV cache in q8_0 (`--kv q8_0`, or type_k and type_v in the settings)"
    if "workers" in change:
        return f"more machines together than {request.workers + 1} (max_workers in the settings)"
    if "policy" in change:
        fastest = Policy.FASTEST.value
        return (
            f"the policy {fastest} instead of {request.policy.value} "
            f"(`--policy {fastest}`, or policy in the settings)"
        )
    if "fixed" in change:
        return "letting the planner decide which node gets how many layers"
    return "spreading it over machines (enable_distributed in the settings)"


def _limit_remedy(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of raising limits on the fewest machines, starting with those that hold back most."""
    amount = _amounts(fleet, lambda capacity: capacity.held_back, 1.0, fits_on)
    return f"raising node.memory_limit (or node.device_limits): it holds back {amount}" if amount else ""


def _group_remedy(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of raising the limits that the system sets for the daemons."""
    amount = _amounts(fleet, lambda capacity: capacity.barred, 1.0, fits_on)
    remedy = "raising MemoryMax or MemoryHigh of the daemon's service, or the memory limit of its container"
    return f"{remedy}: it blocks {amount}" if amount else ""


def _programs_remedy(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of closing other programs. They include the system, so half of it must suffice."""
    amount = _amounts(fleet, lambda capacity: capacity.others, 0.5, fits_on, "")
    return f"closing other programs: they use {amount}" if amount else ""


def _reserve_remedy(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of reserving less for the rest of a machine; half of the reserve must suffice."""
    amount = _amounts(fleet, lambda capacity: capacity.reserved, 0.5, fits_on)
    return f"lowering node.reserve (or node.gpu_reserve): it keeps {amount}" if amount else ""


def _amounts(
    fleet: Fleet,
    size: Callable[[DeviceCapacity], int],
    share: float,
    fits_on: Callable[[Fleet], bool],
    suffix: str = " of free memory",
) -> str:
    """Find the fewest machines on which a ``share`` of ``size`` more room suffices, largest ``size`` first.

    Returns:
        How much and where, in words; empty when even all of it does not suffice.
    """
    sizes = {machine.node: machine.sum_of(size) for machine in fleet.machines}
    trial, found = fleet, list[str]()
    for machine in sorted(fleet.machines, key=lambda candidate: -sizes[candidate.node]):
        if sizes[machine.node] < LEAST_HELD_BACK:
            break
        devices = tuple(replace(c, room=c.room + int(size(c) * share)) for c in machine.devices)
        grown = replace(machine, devices=devices)
        trial = replace(trial, machines=tuple(grown if m.node == machine.node else m for m in trial.machines))
        found.append(f"{bytes_text(sizes[machine.node])}{suffix} on {machine.name}")
        if fits_on(trial):
            return " and ".join(found)
    return ""


def _release_remedies(
    request: PlacementRequest, fleet: Fleet, busy: Sequence[Busy], fits_on: Callable[[Fleet], bool]
) -> list[tuple[Busy, ...]]:
    """Return the smallest busy deployment whose end would make room, or else the fewest of the smallest."""
    smallest = sorted(busy, key=lambda deployment: sum(deployment.bytes.values()))[:4]
    for deployment in smallest:
        if fits_on(_with_released(fleet, deployment)):
            return [(deployment,)]
    trial = fleet
    for count, deployment in enumerate(smallest, 1):
        trial = _with_released(trial, deployment)
        if count > 1 and fits_on(trial):
            return [tuple(smallest[:count])]
    return []


def _machine_remedies(fleet: Fleet, away: Sequence[Away], fits_on: Callable[[Fleet], bool]) -> list[str]:
    """Return what lets each machine take part that would suffice alone, or else the fewest, largest first."""
    single = [a.how for a in away if fits_on(replace(fleet, machines=(*fleet.machines, a.machine)))]
    if single:
        return single
    trial, steps = fleet, list[str]()
    for absent in sorted(away, key=lambda absent: -absent.machine.room)[:_MAX_AWAY]:
        trial = replace(trial, machines=(*trial.machines, absent.machine))
        steps.append(absent.how)
        if len(steps) > 1 and fits_on(trial):
            return [" and ".join(steps)]
    return []


def _with_released(fleet: Fleet, deployment: Busy) -> Fleet:
    capacities = {
        (capacity.node, capacity.device): capacity
        for machine in fleet.machines
        for capacity in machine.devices
    }
    returned: dict[tuple[str, str], int] = {}
    for device, size in deployment.bytes.items():
        if (freed := capacities.get(device)) is not None:
            returned[freed.memory] = returned.get(freed.memory, 0) + size
    return replace(
        fleet,
        machines=tuple(
            replace(
                machine,
                devices=tuple(
                    replace(capacity, room=capacity.room + returned.get(capacity.memory, 0))
                    for capacity in machine.devices
                ),
            )
            for machine in fleet.machines
        ),
    )
