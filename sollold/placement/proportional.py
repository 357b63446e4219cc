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
    for beside in (False, True):
        line = _within_workers(search, _line(search, head, links, beside=beside), head)
        made = _shared_out(search, head, links, line)
        if made is not None:
            return made
    return None


def _line(
    search: SearchContext, head: Machine, links: Mapping[str, Link], *, beside: bool
) -> list[tuple[DeviceCapacity, LayerRoom]]:
    """Return the devices that may take part, the roomiest first.

    With ``beside``, the processors of machines with GPUs follow, unless they share a GPU's memory.
    """
    line: list[tuple[DeviceCapacity, LayerRoom]] = []
    last: set[DeviceCapacity] = set()
    buffers = search.buffers(piped=True)
    for capacities in search.devices.values():
        gpus = {capacity.memory for capacity in capacities if capacity.kind is Kind.GPU}
        for capacity in capacities:
            if capacity.kind is Kind.CPU and gpus and (not beside or capacity.memory in gpus):
                continue
            if capacity.kind is Kind.CPU and gpus:
                last.add(capacity)
            one = search.bin(capacity, head, links)
            room = one.room - buffers.begins
            if one.loading is not None:
                room = min(room, one.loading - max(search.footprint.largest))
            if room > 0:
                line.append((capacity, LayerRoom(room, max(min(room, one.room - buffers.ends), 0))))
    line.sort(key=lambda pair: (pair[0] in last, -pair[1].middle, pair[0].node, pair[0].device))
    return line


def _shared_out(
    search: SearchContext,
    head: Machine,
    links: Mapping[str, Link],
    line: list[tuple[DeviceCapacity, LayerRoom]],
) -> Candidate | None:
    counts = range(1, len(line) + 1)
    if search.request.policy is Policy.SPREAD:
        counts = range(len(line), 0, -1)
    for count in counts:
        # The head's own devices end the line, so that the logits need no network.
        chosen = sorted(line[:count], key=lambda pair: pair[0].machine == head.node)
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
        made = search.evaluate(head, 0, holds, links)
        if not made.short and not (search.request.always and made.alone):
            return made
    return None


def _within_workers(
    search: SearchContext, line: list[tuple[DeviceCapacity, LayerRoom]], head: Machine
) -> list[tuple[DeviceCapacity, LayerRoom]]:
    kept: list[tuple[DeviceCapacity, LayerRoom]] = []
    workers: set[str] = set()
    for capacity, room in line:
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
    given = sum(count for _, count in counts)
    if given in (layers, layers + 1) and all(count >= 0 for _, count in counts):
        return ""
    return f"they sum to {given}; the model has {layers} layers plus the output, {layers + 1} in total"


def fixed(search: SearchContext) -> Candidate | None:
    """Return the placement by the fixed counts, each machine's layers split over its devices."""
    counts = list(search.request.fixed)
    if wrong := miscounted(counts, search.footprint.layers):
        search.lost.append(Alternative("the fixed counts", 0.0, wrong))
        return None
    if sum(count for _, count in counts) == search.footprint.layers:
        counts[-1] = (counts[-1][0], counts[-1][1] + 1)
    for head in sorted(
        search.heads(), key=lambda one: all(node not in (one.node, one.name) for node, _ in counts)
    ):
        made = _fixed_on(search, head, counts)
        if made is None:
            continue
        if not made.short:
            return made
        worst = made.short[0]
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
    on_host, at = 0, 0
    holds: list[Hold] = []
    for node, count in counts:
        machine = next((one for one in search.fleet.machines if node in (one.node, one.name)), None)
        capacities = search.devices[machine.node] if machine is not None else ()
        gpus = [capacity for capacity in capacities if capacity.kind is Kind.GPU]
        capacities = tuple(gpus) or tuple(capacity for capacity in capacities if capacity.kind is Kind.CPU)
        if not capacities:
            search.lost.append(
                Alternative("the fixed counts", 0.0, f"{search.fleet.name(node)} is not available")
            )
            return None
        if machine is head and not gpus and at == 0:
            on_host = at = count
            continue
        memory = search.memory[at : at + count]
        rooms = [LayerRoom(max(capacity.room, 1), max(capacity.room, 1)) for capacity in capacities]
        runs = by_room(memory, rooms) or [(0, count)]
        holds += [(s, at + a, at + b) for s, (a, b) in zip(capacities, runs, strict=False) if b > a]
        at += count
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
    at = 0
    for index, room in enumerate(rooms):
        # If everything left fits on this device, it ends the model.
        if total - at <= count and sums[total] - sums[at] <= room.last * fullness:
            runs.append((at, total))
            runs += [(total, total)] * (len(rooms) - index - 1)
            return runs
        end = at
        while end < total - 1 and end - at < count and sums[end + 1] - sums[at] <= room.middle * fullness:
            end += 1
        runs.append((at, end))
        at = end
    return None
