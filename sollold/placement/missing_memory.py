"""Computes how much memory a model that does not fit needs, how much is missing, and what would fit. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sollold.machine.device import PROCESSOR, Kind
from sollold.models.footprint.footprint import Footprint
from sollold.placement.evaluate import host_share
from sollold.placement.inventory import DeviceCapacity, Fleet, Machine
from sollold.placement.planner import FootprintOf
from sollold.placement.request import PlacementRequest
from sollold.placement.search import FEW
from sollold.settings.schema import GIB, MIB, NodeSettings, PlacementSettings

_STEP = 4 * MIB
"""Accuracy of the missing bytes."""
_LEAST_BITS = 1.8
"""Bits per weight of the smallest quantization in use (IQ1_M)."""


def usable(request: PlacementRequest, fleet: Fleet, alone: Machine | None) -> Sequence[Machine]:
    """Return the machines whose room counts: the head, and the roomiest others up to the maximum number."""
    if alone is None:
        return fleet.machines if request.distributed else ()
    others = [machine for machine in fleet.machines if machine is not alone]
    others.sort(key=lambda machine: -machine.room)
    return (alone, *others[: request.workers if request.distributed else 0])


def missing_on(
    machine: Machine, fleet: Fleet, estimate: int, most: int, fits_on: Callable[[Fleet], bool]
) -> int:
    """Return the least additional bytes on one of the machine's devices with which the model fits.

    Returns 0 if not even ``most`` suffice, or if there are too many machines to try that. ``estimate``: where
    the search begins.
    """
    if len(fleet.machines) > FEW:
        return 0

    def fits(capacity: DeviceCapacity, extra: int) -> bool:
        devices = tuple(
            replace(c, room=c.room + extra) if c.memory == capacity.memory else c for c in machine.devices
        )
        grown = replace(machine, devices=devices)
        return fits_on(replace(fleet, machines=tuple(grown if m is machine else m for m in fleet.machines)))

    found = 0
    for capacity in {c.memory: c for c in machine.devices}.values():
        low, high = 0, found or estimate
        while not found and high < most and not fits(capacity, high):
            low, high = high, min(2 * high, most)
        if not fits(capacity, high):
            continue
        while high - low > _STEP:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(capacity, middle) else (middle, high)
        found = high
    return found


def buffers_on_fewest(
    footprint: Footprint, heads: Sequence[Machine], capacities: Sequence[DeviceCapacity]
) -> int:
    """Return the bytes of compute buffers and processes on the fewest devices that could hold the model."""
    total = sum(footprint.weights) + sum(footprint.state)
    host = host_share(heads[0], footprint, 0, 2) if heads else None
    size = host.total - host.weights if host is not None else footprint.host_buffers
    remaining = total
    for used, capacity in enumerate(sorted(capacities, key=lambda device: -device.room)):
        last = footprint.layers + (1 if used == 0 else 0)
        buffer = footprint.compute(0, last, devices=2, offloaded=footprint.layers + 1) + capacity.overhead
        if remaining <= 0 or capacity.room <= buffer or used == 15:
            break
        size += buffer
        remaining -= capacity.room - buffer
    return size


def additional_machine(
    request: PlacementRequest,
    fleet: Fleet,
    footprint: Footprint,
    missing: int,
    *,
    fits_with: Callable[[Fleet], bool],
) -> int:
    """Return the bytes (whole GiB) of the smallest additional machine that suffices; 0 when one does not."""
    total = footprint.host_weights + sum(footprint.weights) + sum(footprint.state)
    holds = not any(machine.holds for machine in fleet.machines)
    overhead = max((machine.cpu.overhead for machine in fleet.machines if machine.cpu is not None), default=0)

    def fits(size: int) -> bool:
        room = int(size * GIB * (1 - PlacementSettings().spare)) - NodeSettings().reserve
        capacity = DeviceCapacity("another", PROCESSOR, Kind.CPU, room, overhead)
        machine = Machine("another", "another", (capacity,), holds=holds)
        return fits_with(replace(fleet, machines=(*fleet.machines, machine)))

    low, high = -(-max(missing, 1) // GIB) - 1, -(-total * 2 // GIB) + 3
    if low >= high or not fits(high):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * GIB


def largest_file(
    request: PlacementRequest,
    footprint: Footprint,
    fits_as: Callable[[Callable[[FootprintOf], FootprintOf]], bool],
) -> int:
    """Return the size in bytes of the largest file of this model that would fit; 0 when none would."""
    size = request.size or footprint.host_weights + sum(footprint.weights)

    def fits(share: float) -> bool:
        return fits_as(lambda footprint_of: lambda run: _scaled(footprint_of(run), share))

    lowest = request.parameters * _LEAST_BITS / 8 / size if request.parameters else 0.1
    if lowest >= 1 or not fits(lowest):
        return 0
    low, high = lowest, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return int(size * low)


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
