"""A model over several machines: the fastest split, or by the policy or the counts that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nlargest
from math import inf

from sollold.machine.device import Kind
from sollold.placement import speed
from sollold.placement.arrange import Bin
from sollold.placement.draft import Draft
from sollold.placement.fleet import Link, Machine, Spot, links_between
from sollold.placement.rung import Rung
from sollold.placement.share_out import fixed, proportional
from sollold.placement.wish import MOST_DEVICES, Policy

HEADS = 4
"""Heads for which splits are sought at most."""
ALONE = 8
"""Devices of other machines tried for all layers at most."""
MANY = 64
"""Machines from which on half as many are tried."""


def over_several(rung: Rung) -> Draft | None:
    """The best split over several machines by the wish's policy."""
    if rung.wish.fixed:
        return fixed(rung)
    if not rung.wish.distributed:
        return None
    # No more devices than llama.cpp takes, and the head's processor.
    rooms = nlargest(MOST_DEVICES + 1, (spot.room for spots in rung.spots.values() for spot in spots))
    if sum(rooms) < rung.needed:
        return None
    able = [head for head in rung.heads() if rung.may_head(head)]
    heads = sorted(able, key=lambda head: _promise(rung, head))
    heads = heads[: HEADS if len(rung.fleet.machines) <= MANY else HEADS // 2]
    best: Draft | None = None
    for head in heads:
        links = links_between(rung.fleet.machines, head)
        if rung.wish.policy is Policy.FASTEST:
            found = _fastest(rung, head, links, best.seconds if best is not None else inf)
        else:
            found = proportional(rung, head, links)
        if found is None:
            continue
        if best is None or found.seconds < best.seconds * 0.999:
            best, found = found, best
        if found is not None:
            rung.lose(found, f"slower than with {best.head.name} as the head")
    return best


def _promise(rung: Rung, head: Machine) -> tuple[float, str]:
    """Seconds a byte and hops if ``head`` held what fits it: the fewer the better a head it is."""
    left, cost = float(rung.needed), 0.0
    for spot in sorted(rung.spots[head.node], key=lambda s: speed.seconds_per_byte(s, rung.correction)):
        held = min(left, spot.room)
        cost += held * speed.seconds_per_byte(spot, rung.correction)
        left -= held
    trips = sorted(link.round_trip for _, link in head.links)[:3]
    return cost + left / 10e9 + sum(trips), head.node


def _fastest(rung: Rung, head: Machine, links: Mapping[str, Link], below: float) -> Draft | None:
    """Wholly on one device of another machine, over several devices, or the first layers on the head."""
    cpu = next((spot for spot in rung.spots[head.node] if spot.kind is Kind.CPU), None)
    bins = [
        (spot, rung.bin(spot, head, links))
        for machine in rung.fleet.machines
        for spot in rung.spots[machine.node]
    ]
    found = [_on_one_worker(rung, head, bins, links)]
    below = min(below, found[0].seconds if found[0] is not None else inf)
    found.append(rung.search(head, bins, links, below))
    if cpu is not None:
        below = min(below, found[1].seconds if found[1] is not None else inf)
        others = [pair for pair in bins if pair[0] is not cpu]
        found.append(rung.search(head, [*others, (cpu, rung.host_bin(cpu, head))], links, below))
    fitting = [one for one in found if one is not None]
    if not fitting:
        return None
    best = min(fitting, key=lambda one: (one.seconds, len(one.shares)))
    for other in fitting:
        if other is not best and other.shares != best.shares:
            way = "its processor computing the first layers" if other.on_host else "workers alone"
            rung.lose(other, f"{head.name} with {way} is slower")
    return best


def _on_one_worker(
    rung: Rung, head: Machine, bins: Sequence[tuple[Spot, Bin]], links: Mapping[str, Link]
) -> Draft | None:
    """All layers on the quickest device elsewhere that holds them: alone it pipelines nothing."""
    if rung.wish.workers < 1:
        return None
    whole = sum(rung.footprint.active)
    able = [pair for pair in bins if pair[1].worker >= 0 and pair[1].room >= rung.needed]
    able.sort(key=lambda pair: pair[1].hop + pair[1].tail + pair[1].rate * whole)
    for spot, _ in able[:ALONE]:
        made = rung.draft(head, 0, [(spot, 0, rung.total)], links)
        if not made.short:
            return made
    return None
