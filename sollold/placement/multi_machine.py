"""Splits a model over several machines: the fastest way, by another policy, or by fixed layer counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nlargest
from math import inf

from sollold.machine.device import Kind
from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate
from sollold.placement.inventory import DeviceCapacity, Link, Machine, links_between
from sollold.placement.layer_runs import Bin
from sollold.placement.proportional import fixed, proportional
from sollold.placement.request import MOST_DEVICES, Policy
from sollold.placement.search import SearchContext

MAX_HEADS = 4
"""Maximum number of heads for which splits are searched."""
MAX_SINGLE_DEVICES = 8
"""Maximum number of devices of other machines that are tried for all layers."""
MANY = 64
"""Above this many machines, half as many heads are tried."""


def over_several(search: SearchContext) -> Candidate | None:
    """Return the best split over several machines by the request's policy."""
    if search.request.fixed:
        return fixed(search)
    if not search.request.distributed:
        return None
    # At most as many devices as llama.cpp takes, plus the head's processor.
    rooms = nlargest(
        MOST_DEVICES + 1, (capacity.room for capacities in search.devices.values() for capacity in capacities)
    )
    if sum(rooms) < search.needed:
        return None
    able = [head for head in search.heads() if search.may_head(head)]
    heads = sorted(able, key=lambda head: _head_cost(search, head))
    heads = heads[: MAX_HEADS if len(search.fleet.machines) <= MANY else MAX_HEADS // 2]
    best: Candidate | None = None
    for head in heads:
        links = links_between(search.fleet.machines, head)
        if search.request.policy is Policy.FASTEST:
            found = _fastest(search, head, links, best.seconds if best is not None else inf)
        else:
            found = proportional(search, head, links)
        if found is None:
            continue
        if best is None or found.seconds < best.seconds * 0.999:
            best, found = found, best
        if found is not None:
            search.lose(found, f"slower than with {best.head.name} as the head")
    return best


def _head_cost(search: SearchContext, head: Machine) -> tuple[float, str]:
    """Return a sort key: estimated seconds if ``head`` held what fits on it. Lower is a better head."""
    remaining, cost = float(search.needed), 0.0
    for capacity in sorted(
        search.devices[head.node], key=lambda s: cost_model.seconds_per_byte(s, search.correction)
    ):
        held = min(remaining, capacity.room)
        cost += held * cost_model.seconds_per_byte(capacity, search.correction)
        remaining -= held
    trips = sorted(link.round_trip for _, link in head.links)[:3]
    return cost + remaining / 10e9 + sum(trips), head.node


def _fastest(
    search: SearchContext, head: Machine, links: Mapping[str, Link], below: float
) -> Candidate | None:
    """Return the fastest of: one device elsewhere, several devices, the first layers on the head's CPU."""
    cpu = next((capacity for capacity in search.devices[head.node] if capacity.kind is Kind.CPU), None)
    bins = [
        (capacity, search.bin(capacity, head, links))
        for machine in search.fleet.machines
        for capacity in search.devices[machine.node]
    ]
    found = [_on_one_worker(search, head, bins, links)]
    below = min(below, found[0].seconds if found[0] is not None else inf)
    found.append(search.split_over(head, bins, links, below))
    if cpu is not None:
        below = min(below, found[1].seconds if found[1] is not None else inf)
        others = [pair for pair in bins if pair[0] is not cpu]
        found.append(search.split_over(head, [*others, (cpu, search.host_bin(cpu, head))], links, below))
    fitting = [candidate for candidate in found if candidate is not None]
    if not fitting:
        return None
    best = min(fitting, key=lambda candidate: (candidate.seconds, len(candidate.shares)))
    for other in fitting:
        if other is not best and other.shares != best.shares:
            method = "its processor computing the first layers" if other.on_host else "workers alone"
            search.lose(other, f"{head.name} with {method} is slower")
    return best


def _on_one_worker(
    search: SearchContext,
    head: Machine,
    bins: Sequence[tuple[DeviceCapacity, Bin]],
    links: Mapping[str, Link],
) -> Candidate | None:
    """Place all layers on the fastest worker's device that holds them: alone, it pipelines nothing."""
    if search.request.workers < 1:
        return None
    active = sum(search.footprint.active)
    able = [pair for pair in bins if pair[1].worker >= 0 and pair[1].room >= search.needed]
    able.sort(key=lambda pair: pair[1].hop + pair[1].tail + pair[1].rate * active)
    for capacity, _ in able[:MAX_SINGLE_DEVICES]:
        candidate = search.evaluate(head, 0, [(capacity, 0, search.total)], links)
        if not candidate.short:
            return candidate
    return None
