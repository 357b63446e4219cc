"""Decides where a model goes: on one machine if it fits there, else on the fastest split over several. Pure.

`choose` tries the settings of `sollold.placement.context` one after the other. Those with the full context
are tried first on each machine that has the file, then as splits headed by the most promising of these
machines; a smaller context comes last. Losing placements are kept with the reason. When nothing fits,
`sollold.placement.explain` reports what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR, Kind
from sollold.models.footprint.footprint import Footprint
from sollold.models.footprint.run_options import Run
from sollold.placement import context, cost_model
from sollold.placement.evaluate import Candidate, is_worker
from sollold.placement.inventory import DeviceCapacity, Fleet
from sollold.placement.multi_machine import over_several
from sollold.placement.request import PlacementRequest, Policy
from sollold.placement.search import Alternative, SearchContext, external_workers_of
from sollold.placement.single_machine import on_one_machine
from sollold.units import bytes_text

FootprintOf = Callable[[Run], Footprint]

CLEAR_GAIN = 1.5
"""A split replaces a machine that would compute on its processor only if it is this much faster."""


@dataclass(frozen=True, slots=True)
class PlacementChoice:
    """The best placement, with those it beat.

    If ``candidate`` is None, nothing fits, not even with the smallest context. ``footprint`` is then the one
    for that context, and ``alternatives`` say what each placement lacked.
    """

    candidate: Candidate | None
    footprint: Footprint
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]


def choose(
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: FootprintOf,
    correction: cost_model.Correction = cost_model.uncorrected,
) -> PlacementChoice:
    """Find the best placement in the room that ``fleet`` has."""
    footprint_of = cache(footprint_of)

    train = footprint_of(
        context.run_with(request, context.tokens(request, 0), max(request.slots, 1))
    ).context_train
    full, smaller = context.runs_to_try(request, train)
    found: tuple[Candidate, list[Alternative]] | None = None
    basis = SearchContext(request, fleet, footprint_of(full[0]), full[0], correction)

    @cache
    def search_of(run: Run) -> SearchContext:
        return basis if run is full[0] else SearchContext(request, fleet, footprint_of(run), run, correction)

    alone_allowed = not request.always and not request.fixed and request.policy is not Policy.SPREAD
    if alone_allowed:
        # Prefer fewer slots on one machine to many slots over several: tokens are faster there.
        for run in full:
            if run is not full[0] and not _may_hold(basis):
                break
            search = search_of(run)
            alone = on_one_machine(search)
            if alone is not None:
                found = _prefer_split(search, alone), search.lost
                break
    if found is None:

        def attempt(run: Run) -> tuple[Candidate, list[Alternative]] | None:
            search = search_of(run)
            best = on_one_machine(search) if alone_allowed and run in smaller else None
            best = best or over_several(search)
            return (best, search.lost or basis.lost) if best is not None else None

        first, *others = *full, *smaller
        found = attempt(first)
        if found is None and others and (smallest := attempt(others[-1])) is not None:
            # If not even the last one fits, none between does.
            attempts = (result for run in others[:-1] if (result := attempt(run)) is not None)
            found = next(attempts, smallest)
        if found is not None and found[0].run in smaller:
            found = _widen(request, fleet, footprint_of, correction, found, [*full, *smaller], alone_allowed)
    if found is None:
        least = search_of((smaller or full)[-1])
        return PlacementChoice(None, least.footprint, tuple(least.lost or basis.lost), ())
    best, lost = found
    chosen = footprint_of(best.run)
    reasons = [*_reasons(request, fleet, best, chosen), context.given(request, best.run, train)]
    if chosen.estimate:
        reasons.append("Unknown architecture: sizes are conservative estimates.")
    return PlacementChoice(best, chosen, _ranked(lost), tuple(reasons))


def _may_hold(search: SearchContext) -> bool:
    """Return whether some machine with the file has room for the weights alone."""
    weights = sum(search.footprint.weights)
    return any(
        sum(capacity.room for capacity in search.devices[head.node]) >= weights for head in search.heads()
    )


def _widen(
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: FootprintOf,
    correction: cost_model.Correction,
    found: tuple[Candidate, list[Alternative]],
    order: list[Run],
    alone_allowed: bool,
) -> tuple[Candidate, list[Alternative]]:
    """Find the largest context that fits, between the one found and the next larger one tried."""
    index = order.index(found[0].run)
    steps = context.between(request, order[index], order[index - 1])
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        search = SearchContext(request, fleet, footprint_of(steps[middle]), steps[middle], correction)
        best = (on_one_machine(search) if alone_allowed else None) or over_several(search)
        if best is None:
            high = middle
        else:
            low, found = middle, (best, search.lost)
    return found


def _prefer_split(search: SearchContext, alone: Candidate) -> Candidate:
    """Return the split instead if the machine alone would compute on its processor and is clearly slower."""
    if not search.request.distributed or not alone.on_host or len(search.numbers) == 1:
        return alone
    if not any(
        capacity.kind is Kind.GPU for capacities in search.devices.values() for capacity in capacities
    ):
        return alone
    split = over_several(search)
    if split is None:
        return alone
    if split.seconds * CLEAR_GAIN > alone.seconds:
        search.lose(split, "not clearly faster than one machine alone")
        return alone
    search.lose(alone, "its processor would have to compute, and several machines are clearly faster")
    return split


def _ranked(lost: Sequence[Alternative]) -> tuple[Alternative, ...]:
    """Return each alternative once, the fastest first, those that do not fit last; at most 12."""
    by_name: dict[str, Alternative] = {}
    for alternative in lost:
        previous = by_name.get(alternative.what)
        if previous is None or alternative.tokens_per_second > previous.tokens_per_second:
            by_name[alternative.what] = alternative
    return tuple(sorted(by_name.values(), key=lambda alternative: -alternative.tokens_per_second)[:12])


def _reasons(request: PlacementRequest, fleet: Fleet, best: Candidate, footprint: Footprint) -> list[str]:
    """Return sentences for users that explain the placement."""
    size = sum(share.total for share in (best.host, *best.shares))
    head = best.head.name
    devices = [share.device for share in best.shares]
    if best.alone:
        place = " and ".join(devices) if devices else "the processor"
        if best.cpu_moe:
            place += f", the experts of the first {best.cpu_moe} layers on the processor"
        elif devices and best.on_host:
            place += f", the first {best.host.layers} layers on the processor"
        return [f"It fits on {head} alone ({bytes_text(size)} on {place}), so no network slows it down."]
    others = [fleet.name(node) for node in best.nodes[1:]] + external_workers_of(best)
    count = 1 + len(others)
    sentences = []
    if request.fixed:
        sentences.append("The layer counts were given by the caller.")
    elif request.always:
        sentences.append(
            f"It is spread because the settings ask for it: {bytes_text(size)} on {count} machines."
        )
    else:
        sentences.append(
            f"No machine that has the file can hold it alone: {head} runs it with {', '.join(others)}, "
            f"{bytes_text(size)} in total."
        )
    if request.policy is Policy.FASTEST and not request.fixed:
        sentences.append("Of the splits that fit, this one has the least predicted time per token.")
    elif not request.fixed:
        sentences.append(f"The layers are split by the policy {request.policy.value}.")
    hops = [
        share for share in best.shares if is_worker(best.head, _capacity_of(fleet, share.node, share.device))
    ]
    if hops:
        sentences.append(
            f"Each token makes {len(hops)} round trip{'s' if len(hops) != 1 else ''} to workers."
        )
    if unknown := [
        fleet.name(node) for node in best.nodes[1:] if not _is_measured(fleet, best.head.node, node)
    ]:
        sentences.append(
            f"The network between {head} and {_listed(unknown)} has not been measured: 1 Gb/s is assumed."
        )
    if best.on_host:
        sentences.append(f"The first {best.host.layers} layers stay on {head}'s processor, without a hop.")
    return sentences


def _is_measured(fleet: Fleet, head: str, node: str) -> bool:
    """Return whether either side has measured the link. With very many nodes, each measures only some."""
    head_machine, machine = fleet.machine(head), fleet.machine(node)
    return (head_machine is not None and any(peer == node for peer, _ in head_machine.links)) or (
        machine is not None and any(peer == head for peer, _ in machine.links)
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _capacity_of(fleet: Fleet, node: str, device: str) -> DeviceCapacity:
    kind = Kind.CPU if device == PROCESSOR else Kind.GPU
    return fleet.device(node, device) or DeviceCapacity(node, device, kind, 0)
