"""The best placement by exhaustive search over heads, sets and orders of devices, and cut points."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from sollold.machine.device import Kind
from sollold.models.footprint.footprint import Footprint
from sollold.models.footprint.run_options import Run
from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate, Hold, evaluate, host_share, link_to, share_overhead
from sollold.placement.inventory import DeviceCapacity, Fleet, Link, Machine, links_between

Partial = tuple[float, int, tuple[Hold, ...]]
"""An incomplete placement: its seconds, layers on the head's own CPU, and layers of further devices."""


def best_over_several(fleet: Fleet, footprint: Footprint, run: Run) -> Candidate | None:
    """The placement on more than one machine with the least predicted time per token."""
    best: Candidate | None = None
    for head in fleet.machines:
        links = links_between(fleet.machines, head)
        for _, on_host, holds in _best_with_head(fleet, head, footprint, links) if head.holds else ():
            candidate = evaluate(head, footprint, run, on_host, holds, links, cost_model.uncorrected)
            assert not candidate.short
            if best is None or candidate.seconds < best.seconds:
                best = candidate
    return best


def _best_with_head(
    fleet: Fleet, head: Machine, footprint: Footprint, links: dict[str, Link]
) -> Iterable[Partial]:
    """The best placements on one device, on several, and with the first layers on the head's CPU."""
    capacities = [capacity for machine in fleet.machines for capacity in machine.devices]
    cpu = head.cpu
    assert cpu is not None
    total = footprint.layers + 1
    empty: list[Partial] = [(0.0, 0, ())]
    if host_share(head, footprint, 0, 1).total <= cpu.room:
        yield from _best_completion(head, footprint, capacities, links, empty, devices=1, offloaded=total)
    if host_share(head, footprint, 0, 2).total <= cpu.room:
        yield from _best_completion(head, footprint, capacities, links, empty, devices=2, offloaded=total)
    starts: list[Partial] = [
        (cost_model.seconds_per_byte(cpu) * sum(footprint.active[:count]), count, ())
        for count in range(1, total)
        if host_share(head, footprint, count, 2).total <= cpu.room
    ]
    capacities = [capacity for capacity in capacities if capacity is not cpu]
    yield from _best_completion(head, footprint, capacities, links, starts, devices=2, offloaded=total - 1)


def _best_completion(
    head: Machine,
    footprint: Footprint,
    capacities: list[DeviceCapacity],
    links: dict[str, Link],
    starts: list[Partial],
    *,
    devices: int,
    offloaded: int,
) -> Iterable[Partial]:
    """The best completion of ``starts``, by dynamic programming over sets of devices and numbers of layers.

    The memory and time of a device depend only on its own layers.
    """
    total = footprint.layers + 1
    held = host_share(head, footprint, 0, devices).total if offloaded == total else 0
    runs = [_runs(head, footprint, capacity, links, devices, offloaded, held) for capacity in capacities]
    cheapest: dict[tuple[int, int], Partial] = {(0, start[1]): start for start in starts}
    best: Partial = inf, 0, ()
    for mask in range(1 << len(capacities) if devices > 1 else 1):
        for position in range(total):
            before = cheapest.get((mask, position))
            if before is None:
                continue
            for index, capacity in enumerate(capacities):
                joined = mask | 1 << index
                if joined == mask:
                    continue
                for end in range(position + 1, total + 1):
                    cost = runs[index].get((position, end))
                    if cost is None or before[0] + cost >= best[0]:
                        continue
                    after = before[0] + cost, before[1], (*before[2], (capacity, position, end))
                    apart = any(hold.node != head.node for hold, _, _ in after[2])
                    alone = offloaded == total and not mask
                    if end < total:
                        if after[0] < cheapest.get((joined, end), best)[0]:
                            cheapest[joined, end] = after
                    elif apart and alone == (devices == 1 and offloaded == total):
                        best = after
    if best[2]:
        yield best


def _runs(
    head: Machine,
    footprint: Footprint,
    capacity: DeviceCapacity,
    links: dict[str, Link],
    devices: int,
    offloaded: int,
    held: int,
) -> dict[tuple[int, int], float]:
    """Seconds of each run of layers that the device can hold; ``held``: bytes of the head on its own CPU."""
    link = link_to(head, capacity, links)
    room = capacity.room - (held if capacity.node == head.node and capacity.kind is Kind.CPU else 0)
    found = {}
    for first in range(footprint.layers + 1):
        for last in range(first + 1, footprint.layers + 2):
            state = sum(footprint.state[first:last])
            compute = footprint.compute(first, last, devices=devices, offloaded=offloaded)
            size = sum(footprint.weights[first:last]) + state + compute
            largest = max(footprint.largest[first:last])
            size += share_overhead(capacity, link is not None, largest, state, compute)
            if size > room:
                continue
            output = last > footprint.layers
            part = cost_model.Part(capacity, sum(footprint.active[first:last]), 0, link, output)
            found[first, last] = cost_model.decode_seconds([part], footprint.n_embd, footprint.n_vocab)
    return found
