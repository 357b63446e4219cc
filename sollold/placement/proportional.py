"""Splits layers by a policy other than speed, or by counts that the user fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from sollold.facts import dataclass
from sollold.machine.device import Kind
from sollold.placement.evaluate import Candidate, Hold
from sollold.placement.inventory import DeviceCapacity, Link, Machine, links_between
from sollold.placement.request import MOST_DEVICES, Policy
from sollold.placement.search import Alternative, SearchContext
from sollold.units import bytes_text


def proportional(search: SearchContext, head: Machine, links: Mapping[str, Link]) -> Candidate | None:
    """Return the split by policy ``memory_aware``, ``even`` or ``spread``.

    It uses GPUs, and the processors of machines without any. If these do not suffice, processors of machines
    with GPUs take part too.
    """
    for with_cpus in (False, True):
        devices = _within_workers(search, _usable_devices(search, head, links, with_cpus=with_cpus), head)
        candidate = _share_out(search, head, links, devices)
        if candidate is not None:
            return candidate
    return None


def _usable_devices(
    search: SearchContext, head: Machine, links: Mapping[str, Link], *, with_cpus: bool
) -> list[tuple[DeviceCapacity, LayerRoom]]:
    """Return the devices that may take part, the roomiest first.

    With ``with_cpus``, the processors of machines with GPUs follow, unless they share a GPU's memory.
    """
    devices: list[tuple[DeviceCapacity, LayerRoom]] = []
    cpus_last: set[DeviceCapacity] = set()
    buffers = search.buffers(piped=True)
    for capacities in search.devices.values():
        gpus = {capacity.memory for capacity in capacities if capacity.kind is Kind.GPU}
        for capacity in capacities:
            if capacity.kind is Kind.CPU and gpus and (not with_cpus or capacity.memory in gpus):
                continue
            if capacity.kind is Kind.CPU and gpus:
                cpus_last.add(capacity)
            device = search.bin(capacity, head, links)
            room = device.room - buffers.begins
            if device.loading is not None:
                room = min(room, device.loading - max(search.footprint.largest))
            if room > 0:
                devices.append((capacity, LayerRoom(room, max(min(room, device.room - buffers.ends), 0))))
    devices.sort(key=lambda pair: (pair[0] in cpus_last, -pair[1].middle, pair[0].node, pair[0].device))
    return devices


def _share_out(
    search: SearchContext,
    head: Machine,
    links: Mapping[str, Link],
    devices: list[tuple[DeviceCapacity, LayerRoom]],
) -> Candidate | None:
    counts = range(1, len(devices) + 1)
    if search.request.policy is Policy.SPREAD:
        counts = range(len(devices), 0, -1)
    for count in counts:
        # The head's own devices end the line, so that the logits need no network.
        chosen = sorted(devices[:count], key=lambda pair: pair[0].machine == head.node)
        rooms = [room for _, room in chosen]
        share_out = by_count if search.request.policy is Policy.EVEN else by_room
        runs = share_out(search.memory, rooms)
        if runs is None:
            continue
        holds = [
            (capacity, first, last)
            for (capacity, _), (first, last) in zip(chosen, runs, strict=True)
            if last > first
        ]
        candidate = search.evaluate(head, 0, holds, links)
        if not candidate.short and not (search.request.always and candidate.alone):
            return candidate
    return None


def _within_workers(
    search: SearchContext, devices: list[tuple[DeviceCapacity, LayerRoom]], head: Machine
) -> list[tuple[DeviceCapacity, LayerRoom]]:
    kept: list[tuple[DeviceCapacity, LayerRoom]] = []
    workers: set[str] = set()
    for capacity, room in devices:
        if len(kept) == MOST_DEVICES:
            break
        if capacity.machine != head.node:
            if capacity.machine not in workers and len(workers) >= search.request.workers:
                continue
            workers.add(capacity.machine)
        kept.append((capacity, room))
    return kept


def miscounted(counts: Sequence[tuple[str, int]], layers: int) -> str:
    """Return why the fixed counts do not suit a model with this many layers; empty when they do."""
    total = sum(count for _, count in counts)
    if total in (layers, layers + 1) and all(count >= 0 for _, count in counts):
        return ""
    return f"they sum to {total}; the model has {layers} layers plus the output, {layers + 1} in total"


def fixed(search: SearchContext) -> Candidate | None:
    """Return the placement by the fixed counts, each machine's layers split over its devices."""
    counts = list(search.request.fixed)
    if fault := miscounted(counts, search.footprint.layers):
        search.lost.append(Alternative("the fixed counts", 0.0, fault))
        return None
    if sum(count for _, count in counts) == search.footprint.layers:
        counts[-1] = (counts[-1][0], counts[-1][1] + 1)
    for head in sorted(search.heads(), key=lambda m: all(node not in (m.node, m.name) for node, _ in counts)):
        candidate = _fixed_on(search, head, counts)
        if candidate is None:
            continue
        if not candidate.short:
            return candidate
        worst = candidate.short[0]
        search.lost.append(
            Alternative(
                f"the fixed counts with {head.name} as the head",
                0.0,
                f"{search.fleet.name(worst.node)} {worst.device} would need {bytes_text(worst.needed)}, "
                f"{bytes_text(worst.room)} available",
            )
        )
    return None


def _fixed_on(search: SearchContext, head: Machine, counts: list[tuple[str, int]]) -> Candidate | None:
    links = links_between(search.fleet.machines, head)
    on_host, start = 0, 0
    holds: list[Hold] = []
    for node, count in counts:
        machine = next((entry for entry in search.fleet.machines if node in (entry.node, entry.name)), None)
        capacities = search.devices[machine.node] if machine is not None else ()
        gpus = [capacity for capacity in capacities if capacity.kind is Kind.GPU]
        capacities = tuple(gpus) or tuple(capacity for capacity in capacities if capacity.kind is Kind.CPU)
        if not capacities:
            search.lost.append(
                Alternative("the fixed counts", 0.0, f"{search.fleet.name(node)} is not available")
            )
            return None
        if machine is head and not gpus and start == 0:
            on_host = start = count
            continue
        memory = search.memory[start : start + count]
        rooms = [LayerRoom(max(capacity.room, 1), max(capacity.room, 1)) for capacity in capacities]
        runs = by_room(memory, rooms) or [(0, count)]
        holds += [(s, start + a, start + b) for s, (a, b) in zip(capacities, runs, strict=False) if b > a]
        start += count
    if len(holds) > MOST_DEVICES:
        reason = f"they need {len(holds)} devices, and llama.cpp takes at most {MOST_DEVICES}"
        search.lost.append(Alternative("the fixed counts", 0.0, reason))
        return None
    return search.evaluate(head, on_host, holds, links)


@dataclass(frozen=True, slots=True)
class LayerRoom:
    """Bytes for layers on a device; ``last``: bytes if it also holds the output."""

    middle: int
    last: int


def by_room(memory: Sequence[int], rooms: Sequence[LayerRoom]) -> list[tuple[int, int]] | None:
    """Return runs with bytes in proportion to the rooms, some possibly empty; None when nothing fits."""
    low, high = 0.0, 1.0
    best = _fill(memory, rooms, 1.0, len(memory))
    if best is None:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        runs = _fill(memory, rooms, middle, len(memory))
        if runs is None:
            low = middle
        else:
            best, high = runs, middle
    return best


def by_count(memory: Sequence[int], rooms: Sequence[LayerRoom]) -> list[tuple[int, int]] | None:
    """Return runs with layer counts as equal as possible, some possibly empty; None when nothing fits."""
    low, high = 1, len(memory)
    best = _fill(memory, rooms, 1.0, high)
    while low < high and best is not None:
        middle = (low + high) // 2
        runs = _fill(memory, rooms, 1.0, middle)
        if runs is None:
            low = middle + 1
        else:
            best, high = runs, middle
    return best


def _fill(
    memory: Sequence[int], rooms: Sequence[LayerRoom], fullness: float, count: int
) -> list[tuple[int, int]] | None:
    total = len(memory)
    sums = [0, *accumulate(memory)]
    runs = []
    done = 0
    for index, room in enumerate(rooms):
        # If everything left fits on this device, it ends the model.
        if total - done <= count and sums[total] - sums[done] <= room.last * fullness:
            runs.append((done, total))
            runs += [(total, total)] * (len(rooms) - index - 1)
            return runs
        end = done
        while end < total - 1 and end - done < count and sums[end + 1] - sums[done] <= room.middle * fullness:
            end += 1
        runs.append((done, end))
        done = end
    return None
