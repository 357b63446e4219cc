"""The best placement by trying all: each head, set and order of devices, and cut that fits to the byte."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from sollold.machine.device import Kind
from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement import speed
from sollold.placement.draft import Draft, Hold, draft, host_share, link_to, share_overhead
from sollold.placement.fleet import Fleet, Link, Machine, Spot, links_between

Begun = tuple[float, int, tuple[Hold, ...]]
"""Seconds so far, layers on the head's own processor, and the devices after it."""


def best_over_several(fleet: Fleet, footprint: Footprint, run: Run) -> Draft | None:
    """The placement over more than one machine with the least predicted time per token."""
    best: Draft | None = None
    for head in fleet.machines:
        links = links_between(fleet.machines, head)
        for _, on_host, holds in _of_head(fleet, head, footprint, links) if head.holds else ():
            made = draft(head, footprint, run, on_host, holds, links, speed.uncorrected)
            assert not made.short
            if best is None or made.seconds < best.seconds:
                best = made
    return best


def _of_head(fleet: Fleet, head: Machine, footprint: Footprint, links: dict[str, Link]) -> Iterable[Begun]:
    """The best on one device, the best over several, and the best with first layers on the head."""
    spots = [spot for machine in fleet.machines for spot in machine.spots]
    cpu = head.cpu
    assert cpu is not None
    total = footprint.layers + 1
    empty = [(0.0, 0, ())]
    if host_share(head, footprint, 0, 1).total <= cpu.room:
        yield from _filled(head, footprint, spots, links, empty, devices=1, offloaded=total)
    if host_share(head, footprint, 0, 2).total <= cpu.room:
        yield from _filled(head, footprint, spots, links, empty, devices=2, offloaded=total)
    begun: list[Begun] = [
        (speed.seconds_per_byte(cpu) * sum(footprint.active[:count]), count, ())
        for count in range(1, total)
        if host_share(head, footprint, count, 2).total <= cpu.room
    ]
    spots = [spot for spot in spots if spot is not cpu]
    yield from _filled(head, footprint, spots, links, begun, devices=2, offloaded=total - 1)


def _filled(
    head: Machine,
    footprint: Footprint,
    spots: list[Spot],
    links: dict[str, Link],
    begun: list[Begun],
    *,
    devices: int,
    offloaded: int,
) -> Iterable[Begun]:
    """By sets of devices and prefixes: what a device takes and costs depends on its own run alone."""
    total = footprint.layers + 1
    held = host_share(head, footprint, 0, devices).total if offloaded == total else 0
    runs = [_runs(head, footprint, spot, links, devices, offloaded, held) for spot in spots]
    known: dict[tuple[int, int], Begun] = {(0, one[1]): one for one in begun}
    best: Begun = inf, 0, ()
    for mask in range(1 << len(spots) if devices > 1 else 1):
        for at in range(total):
            before = known.get((mask, at))
            if before is None:
                continue
            for index, spot in enumerate(spots):
                joined = mask | 1 << index
                if joined == mask:
                    continue
                for end in range(at + 1, total + 1):
                    cost = runs[index].get((at, end))
                    if cost is None or before[0] + cost >= best[0]:
                        continue
                    after = before[0] + cost, before[1], (*before[2], (spot, at, end))
                    apart = any(one.node != head.node for one, _, _ in after[2])
                    alone = offloaded == total and not mask
                    if end < total:
                        if after[0] < known.get((joined, end), best)[0]:
                            known[joined, end] = after
                    elif apart and alone == (devices == 1 and offloaded == total):
                        best = after
    if best[2]:
        yield best


def _runs(
    head: Machine,
    footprint: Footprint,
    spot: Spot,
    links: dict[str, Link],
    devices: int,
    offloaded: int,
    held: int,
) -> dict[tuple[int, int], float]:
    """Seconds of each run of layers that the device can hold; ``held``: what the head itself takes there."""
    link = link_to(head, spot, links)
    room = spot.room - (held if spot.node == head.node and spot.kind is Kind.CPU else 0)
    found = {}
    for first in range(footprint.layers + 1):
        for last in range(first + 1, footprint.layers + 2):
            state = sum(footprint.state[first:last])
            compute = footprint.compute(first, last, devices=devices, offloaded=offloaded)
            size = sum(footprint.weights[first:last]) + state + compute
            largest = max(footprint.largest[first:last])
            size += share_overhead(spot, link is not None, largest, state, compute)
            if size > room:
                continue
            output = last > footprint.layers
            part = speed.Part(spot, sum(footprint.active[first:last]), 0, link, output)
            found[first, last] = speed.decode_seconds([part], footprint.n_embd, footprint.n_vocab)
    return found
