"""Explains why a model does not fit, in numbers, with the cheapest remedies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR, Kind
from sollold.models.footprint.footprint import Footprint
from sollold.placement import context, cost_model
from sollold.placement.evaluate import Candidate, host_share
from sollold.placement.inventory import DeviceCapacity, Fleet, Machine
from sollold.placement.planner import FootprintOf, PlacementChoice, choose
from sollold.placement.request import PlacementRequest, Policy
from sollold.settings.schema import GIB
from sollold.units import bytes_text

LEAST_HELD_BACK = 64 * 1024**2
"""Minimum bytes that a node must hold back for a remedy to mention it."""
LEAST_BITS = 1.8
"""Bits per weight of the smallest quantization in use (IQ1_M)."""
_MOST_AWAY = 8
"""Machines that are tried together, of those that take no part."""
_WIDER_THAN_Q8 = {"f32", "f16", "bf16"}


@dataclass(frozen=True, slots=True)
class Busy:
    """A deployment that may not be evicted now; ``bytes``: what it holds, by (node, device)."""

    deployment: str
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
        there: room on the machines that may take part.
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
) -> Shortfall:
    """Work out what is missing after `choose` found no placement, and try what would help."""
    footprint = choice.footprint
    heads = [machine for machine in fleet.machines if machine.holds]
    weights = footprint.host_weights + sum(footprint.weights)
    state = sum(footprint.state)
    capacities = [capacity for machine in fleet.machines for capacity in machine.devices if capacity.room > 0]
    alone = max(heads, key=lambda machine: machine.room, default=None)
    buffers = _buffers(footprint, heads, capacities)
    needed = weights + state + buffers
    usable = fleet.machines if request.distributed else (alone,) if alone is not None else ()
    there = sum(machine.room for machine in usable)
    missing = max(0, needed - there)
    remedies = tuple(_remedies(request, fleet, footprint_of, footprint, busy, correction, missing, away))
    least = context.tokens(request, footprint.context_train)
    if not request.context:
        least = min(least, context.LEAST)
    setting = f"with {least} tokens of context for one request at a time"
    parts = [
        f"{request.model} does not fit. It needs {bytes_text(needed)} {setting} "
        f"(weights {bytes_text(weights)}, context {bytes_text(state)}, buffers {bytes_text(buffers)}).",
        _available(fleet, request, there),
    ]
    if missing:
        parts.append(f"Missing: {bytes_text(missing)}.")
    elif not heads:
        parts.append("No machine that has the file can take part.")
    else:
        parts.append(
            "Total memory suffices but is fragmented: each layer must fit whole on one device, with that "
            "device's buffers" + _closest(choice) + "."
        )
    if remedies:
        parts.append("What would help: " + "; ".join(remedies) + ".")
    parts += [f"{one.name} is left out: {one.reason}." for one in fleet.left_out[:5]]
    return Shortfall(needed, there, missing, weights, state, buffers, remedies, " ".join(parts))


def _buffers(footprint: Footprint, heads: Sequence[Machine], capacities: Sequence[DeviceCapacity]) -> int:
    """Return the bytes of compute buffers and processes on the fewest devices that could hold the model."""
    total = sum(footprint.weights) + sum(footprint.state)
    host = host_share(heads[0], footprint, 0, 2) if heads else None
    size = host.total - host.weights if host is not None else footprint.host_buffers
    left = total
    for used, capacity in enumerate(sorted(capacities, key=lambda one: -one.room)):
        last = footprint.layers + (1 if used == 0 else 0)
        each = footprint.compute(0, last, devices=2, offloaded=footprint.layers + 1) + capacity.overhead
        if left <= 0 or capacity.room <= each or used == 15:
            break
        size += each
        left -= capacity.room - each
    return size


def _available(fleet: Fleet, request: PlacementRequest, there: int) -> str:
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
    whole = "" if request.distributed else ", and models are not spread over machines here"
    return f"There is room for {bytes_text(there)}: {listed or 'no machine'}{whole}."


def _closest(choice: PlacementChoice) -> str:
    one = next((a for a in choice.alternatives if a.tokens_per_second == 0.0), None)
    return f" ({one.what}: {one.reason})" if one is not None else ""


def _remedies(
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: FootprintOf,
    footprint: Footprint,
    busy: Sequence[Busy],
    correction: cost_model.Correction,
    missing: int,
    away: Sequence[Away],
) -> list[str]:
    """Return what would help, each tried: phrases, the cheapest first."""

    def fits(
        other: PlacementRequest, on: Fleet = fleet, footprint_with: FootprintOf = footprint_of
    ) -> Candidate | None:
        return choose(other, on, footprint_with, correction).candidate

    found = _by_settings(request, fits)

    def fits_on(on: Fleet) -> bool:
        return fits(request, on) is not None

    if limits := _within_limits(fleet, fits_on):
        found.append(limits)
    if limits := _within_group(fleet, fits_on):
        found.append(limits)
    for one in _releasing(request, fleet, busy, fits_on):
        held = bytes_text(sum(sum(part.bytes.values()) for part in one))
        models = " and ".join(part.model for part in one)
        found.append(f"{models} releasing {'its' if len(one) == 1 else 'their'} {held} ({one[0].reason})")
    found += _taking_part(fleet, away, fits_on)
    found += filter(None, (_without_others(fleet, fits_on), _without_reserve(fleet, fits_on)))
    if size := _quantized(request, footprint, lambda of: fits(request, fleet, of(footprint_of)) is not None):
        found.append(f"a smaller quantization of the model: a file of at most {bytes_text(size)}")
    if request.distributed and not request.fixed:
        size = _additional_machine(request, fleet, footprint, missing, fits_with=fits_on)
        if size:
            found.append(f"another machine with {size // GIB} GiB of free memory")
    if not found:
        found.append("a smaller model")
    return found


def _by_settings(
    request: PlacementRequest, fits: Callable[[PlacementRequest], Candidate | None]
) -> list[str]:
    """Return the changes to the request or settings that help: each alone, or else the fewest together."""
    changes: list[dict[str, object]] = []
    if request.context > context.LEAST:
        changes.append({"context": 0, "usual": request.context})
    if {request.type_k, request.type_v} & _WIDER_THAN_Q8:
        changes.append(dict.fromkeys(("type_k", "type_v"), "q8_0"))
    if not request.distributed:
        changes.append({"distributed": True})
    if request.fixed:
        changes.append({"fixed": ()})
    elif request.policy is not Policy.FASTEST:
        changes.append({"policy": Policy.FASTEST})
    for count in range(1, len(changes) + 1):
        found = []
        for some in combinations(changes, count):
            other = replace(request, **{name: value for change in some for name, value in change.items()})  # type: ignore[arg-type]
            made = fits(other)
            if made is not None:
                found.append(" with ".join(_setting(change, request, made) for change in some))
        if found:
            return found
    return []


def _setting(change: dict[str, object], request: PlacementRequest, made: Candidate) -> str:
    if "context" in change:
        return f"a context of {made.run.request_context} tokens instead of {request.context}"
    if "type_k" in change:
        return "a KV cache in q8_0 (`--kv q8_0`, or type_k and type_v in the settings)"
    if "policy" in change:
        return f"the policy {Policy.FASTEST.value} instead of {request.policy.value}"
    if "fixed" in change:
        return "letting the planner decide which node gets how many layers"
    return "spreading it over machines (enable_distributed in the settings)"


def _within_limits(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of raising limits on the fewest machines, starting with those that hold back most."""
    held = _where(fleet, lambda one: one.held_back, 1.0, fits_on)
    return f"raising node.memory_limit (or node.device_limits): it holds back {held}" if held else ""


def _within_group(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of raising the limits that the system sets for the daemons."""
    barred = _where(fleet, lambda one: one.barred, 1.0, fits_on)
    how = "raising MemoryMax of the daemon's service, or the memory limit of its container"
    return f"{how}: it blocks {barred}" if barred else ""


def _without_others(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of closing other programs. They include the system, so half of it must suffice."""
    used = _where(fleet, lambda one: one.others, 0.5, fits_on, "")
    return f"closing other programs: they use {used}" if used else ""


def _without_reserve(fleet: Fleet, fits_on: Callable[[Fleet], bool]) -> str:
    """Return the remedy of reserving less for the rest of a machine; half of the reserve must suffice."""
    kept = _where(fleet, lambda one: one.reserved, 0.5, fits_on)
    return f"lowering node.reserve (or node.gpu_reserve): it keeps {kept}" if kept else ""


def _where(
    fleet: Fleet,
    size: Callable[[DeviceCapacity], int],
    share: float,
    fits_on: Callable[[Fleet], bool],
    of: str = " of free memory",
) -> str:
    """Find the fewest machines on which a ``share`` of ``size`` more room suffices, largest ``size`` first.

    Returns:
        How much and where, in words; empty when even all of it does not suffice.
    """
    sizes = {machine.node: machine.sum_of(size) for machine in fleet.machines}
    on, found = fleet, list[str]()
    for machine in sorted(fleet.machines, key=lambda one: -sizes[one.node]):
        if sizes[machine.node] < LEAST_HELD_BACK:
            break
        devices = tuple(replace(one, room=one.room + int(size(one) * share)) for one in machine.devices)
        more = replace(machine, devices=devices)
        on = replace(on, machines=tuple(more if one.node == machine.node else one for one in on.machines))
        found.append(f"{bytes_text(sizes[machine.node])}{of} on {machine.name}")
        if fits_on(on):
            return " and ".join(found)
    return ""


def _releasing(
    request: PlacementRequest, fleet: Fleet, busy: Sequence[Busy], fits_on: Callable[[Fleet], bool]
) -> list[tuple[Busy, ...]]:
    """Return the smallest busy deployment whose end would make room, or else the fewest of the smallest."""
    some = sorted(busy, key=lambda one: sum(one.bytes.values()))[:4]
    for one in some:
        if fits_on(_with_released(fleet, one)):
            return [(one,)]
    on = fleet
    for count, one in enumerate(some, 1):
        on = _with_released(on, one)
        if count > 1 and fits_on(on):
            return [tuple(some[:count])]
    return []


def _taking_part(fleet: Fleet, away: Sequence[Away], fits_on: Callable[[Fleet], bool]) -> list[str]:
    """Return what lets each machine take part that would suffice alone, or else the fewest, largest first."""
    alone = [one.how for one in away if fits_on(replace(fleet, machines=(*fleet.machines, one.machine)))]
    if alone:
        return alone
    on, together = fleet, list[str]()
    for one in sorted(away, key=lambda one: -one.machine.room)[:_MOST_AWAY]:
        on = replace(on, machines=(*on.machines, one.machine))
        together.append(one.how)
        if len(together) > 1 and fits_on(on):
            return [" and ".join(together)]
    return []


def _quantized(
    request: PlacementRequest,
    footprint: Footprint,
    fits_as: Callable[[Callable[[FootprintOf], FootprintOf]], bool],
) -> int:
    """Return the size in bytes of the largest file of this model that would fit; 0 when none would."""
    whole = request.size or footprint.host_weights + sum(footprint.weights)

    def fits(share: float) -> bool:
        return fits_as(lambda footprint_of: lambda run: _scaled(footprint_of(run), share))

    least = request.parameters * LEAST_BITS / 8 / whole if request.parameters else 0.1
    if least >= 1 or not fits(least):
        return 0
    low, high = least, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return int(whole * low)


def _scaled(footprint: Footprint, share: float) -> Footprint:
    """Return the footprint with weights scaled to ``share`` of their size."""
    return replace(
        footprint,
        weights=tuple(int(size * share) for size in footprint.weights),
        active=tuple(int(size * share) for size in footprint.active),
        host_weights=int(footprint.host_weights * share),
        largest_tensor=int(footprint.largest_tensor * share),
        largest=tuple(int(size * share) for size in footprint.largest),
    )


def _with_released(fleet: Fleet, one: Busy) -> Fleet:
    capacities = {
        (capacity.node, capacity.device): capacity
        for machine in fleet.machines
        for capacity in machine.devices
    }
    back: dict[tuple[str, str], int] = {}
    for device, size in one.bytes.items():
        if (freed := capacities.get(device)) is not None:
            back[freed.memory] = back.get(freed.memory, 0) + size
    return replace(
        fleet,
        machines=tuple(
            replace(
                machine,
                devices=tuple(
                    replace(capacity, room=capacity.room + back.get(capacity.memory, 0))
                    for capacity in machine.devices
                ),
            )
            for machine in fleet.machines
        ),
    )


def _additional_machine(
    request: PlacementRequest,
    fleet: Fleet,
    footprint: Footprint,
    missing: int,
    *,
    fits_with: Callable[[Fleet], bool],
) -> int:
    """Return the bytes (whole GiB) of the smallest additional machine that suffices; 0 when one does not."""
    whole = footprint.host_weights + sum(footprint.weights) + sum(footprint.state)
    holds = not any(machine.holds for machine in fleet.machines)

    def fits(size: int) -> bool:
        capacity = DeviceCapacity("another", PROCESSOR, Kind.CPU, size * GIB)
        machine = Machine("another", "another", (capacity,), holds=holds)
        return fits_with(replace(fleet, machines=(*fleet.machines, machine)))

    low, high = -(-max(missing, 1) // GIB) - 1, -(-whole * 2 // GIB) + 2
    if low >= high or not fits(high):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * GIB
