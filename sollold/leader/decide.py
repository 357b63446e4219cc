"""Decides what to do for a model: use what runs, wait for what is loading, place it, or refuse. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

from sollold.cluster.gossip.record import ids_and_hosts
from sollold.errors import Fault
from sollold.leader.decision import Decision, FetchFirst, Place, PlaceLater, Refuse
from sollold.leader.eviction import beside_what, best_eviction, evictable, reasons_to_end
from sollold.leader.existing import (
    Located,
    Mismatch,
    ReloadWhenIdle,
    Use,
    as_it_ran,
    context_needed,
    find_existing,
    footprint_of,
    in_ollama,
    lost_lately,
    missing_options,
    request_of,
    with_options_of,
)
from sollold.leader.messages import Ensure
from sollold.leader.prefetch import place_with_fetch
from sollold.leader.snapshot import Bytes, ClusterSnapshot, in_use, runs_on_llama, why_blocked
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from sollold.placement import context
from sollold.placement.evaluate import Candidate
from sollold.placement.explain import explain
from sollold.placement.inventory import Fleet
from sollold.placement.planner import FootprintOf, PlacementChoice, choose
from sollold.placement.proportional import miscounted
from sollold.placement.request import AUTO, OFF, PlacementRequest
from sollold.placement.speculation import with_drafts
from sollold.units import bytes_text


def decide(ask: Ensure, snapshot: ClusterSnapshot) -> Decision:
    """Return the decision. ``snapshot.holders`` must not be empty: the model was found."""
    if ask.fixed and (wrong := _invalid_counts(ask, snapshot)):
        return Refuse(Fault.BAD_REQUEST, wrong)
    named = [name for name in (ask.type_k, ask.type_v) if name]
    if snapshot.shape is not None and not snapshot.shape.takes_cache(*named):
        size, types = snapshot.shape.head_size, " and ".join(dict.fromkeys(named))
        impossible = f"has no KV cache in {types}: its heads of {size} elements are not whole blocks of it"
        return Refuse(Fault.BAD_REQUEST, f"{snapshot.holders[0][1].name} {impossible}. Use f16.")
    decision = _decide(ask, snapshot)
    if isinstance(decision, Refuse) and decision.compute_shortfall is not None:
        shortfall = decision.compute_shortfall()
        return replace(decision, message=shortfall.message, shortfall=shortfall, compute_shortfall=None)
    return decision


def _decide(ask: Ensure, snapshot: ClusterSnapshot) -> Decision:
    existing = find_existing(ask, snapshot)
    if isinstance(existing, tuple | Mismatch) and (same := _drafts_the_same(ask, snapshot)):
        return same
    if isinstance(existing, ReloadWhenIdle) and not ask.more:
        return _load_beside(ask, snapshot, existing)
    larger: Located | None = None
    if isinstance(existing, tuple):
        larger = existing
        ask = with_options_of(ask, larger[1].asked)
    elif existing is not None and not ask.more:
        return existing
    elif not ask.more and (lost := lost_lately(ask, snapshot)) is not None:
        # Load it as it ran before it was lost, if that is still possible.
        again = as_it_ran(ask, lost.asked, snapshot.settings.placement.context)
        placed = _placement(again, snapshot, None)
        if isinstance(placed, Place):
            return replace(placed, pinned=lost.pinned)
    placed = _placement(ask, snapshot, larger)
    if isinstance(placed, Refuse) and snapshot.avoided:
        snapshot = replace(snapshot, avoided={})
        placed = _placement(ask, snapshot, larger)
    if isinstance(placed, Refuse) and snapshot.last_resort:
        placed = _with_last_resort(ask, snapshot, larger, placed)
    if isinstance(placed, Place) and larger is not None:
        record, endpoint = larger
        if (
            not missing_options(ask, larger[1], snapshot)
            and placed.plan.run.request_context <= endpoint.context
        ):
            return Use(endpoint.id, record.node, _no_room_for(ask, snapshot))
        placed = _rounded_up(ask, snapshot, larger, placed)
    if isinstance(placed, Refuse):
        if larger is not None and not missing_options(ask, larger[1], snapshot):
            record, endpoint = larger
            return Use(endpoint.id, record.node, _no_room_for(ask, snapshot))
        if existing is not None and not isinstance(existing, tuple):
            return existing
        awaited = _defer_until_back(ask, snapshot, placed)
        if isinstance(awaited, PlaceLater):
            return awaited
        # Better let an Ollama try with the memory it finds than refuse.
        if ask.ollama and not ask.more and (last := in_ollama(ask, snapshot, surely=False)) is not None:
            return last
    if isinstance(placed, Place) and placed.evictions and ask.more and existing is not None:
        return existing if not isinstance(existing, tuple) else placed
    return placed


def _drafts_the_same(ask: Ensure, snapshot: ClusterSnapshot) -> Use | None:
    """Return the running deployment if reloading it for this caller would not change its drafts, else None.

    The requested speculation may be impossible here, or may be what was chosen already.
    """
    if not ask.placement.speculation:
        return None
    running = find_existing(replace(ask, placement=replace(ask.placement, speculation="")), snapshot)
    if not isinstance(running, Use):
        return None
    located = next(pair for pair in snapshot.endpoints() if pair[1].id == running.endpoint)
    endpoint, wanted = located[1], ask.placement.speculation
    if endpoint.reason and wanted == endpoint.asked.speculation:
        return running  # It was tried, and llama.cpp could not.
    if wanted == AUTO and in_use(endpoint):
        return running  # AUTO leaves the choice to us: no reason to interrupt running requests.
    placed = _placement(with_options_of(ask, endpoint.asked), snapshot, located)
    drafter = placed.plan.drafts_by if isinstance(placed, Place) else ""
    return running if drafter == endpoint.drafts.by or (wanted not in (OFF, AUTO) and not drafter) else None


def _load_beside(
    ask: Ensure, snapshot: ClusterSnapshot, running: ReloadWhenIdle
) -> Place | Use | ReloadWhenIdle:
    """Load another deployment beside one in use with too little context if memory is free, else wait."""
    beside = _placement(replace(ask, more=True), snapshot, None)
    if isinstance(beside, Place) and beside.plan.run.request_context >= context_needed(ask, snapshot):
        why = f"{running.message}, so another is loaded beside it."
        plan = replace(beside.plan, reasons=(*beside.plan.reasons, why))
        return replace(beside, plan=plan, beside=True)
    if running.located is not None and isinstance(_placement(ask, snapshot, running.located), Refuse):
        return Use(running.endpoint, running.node, _no_room_for(ask, snapshot))
    return running


def _no_room_for(ask: Ensure, snapshot: ClusterSnapshot) -> str:
    return f"a context of {context_needed(ask, snapshot)} tokens does not fit {beside_what(snapshot)}"


def _invalid_counts(ask: Ensure, snapshot: ClusterSnapshot) -> str:
    """Return why the caller's fixed counts are invalid, whatever the memory; empty when they are valid."""
    records = {record.node: record for record in (*snapshot.records, *snapshot.expected)}
    meant = {
        name: [name] if name in records else [node for node, record in records.items() if record.name == name]
        for name, _ in ask.fixed
    }
    begin = "The layers can't be placed as named"
    if absent := [name for name, nodes in meant.items() if not nodes]:
        names = ", ".join(sorted(record.name for record in snapshot.records))
        return f"{begin}: there is no node {' or '.join(absent)}; nodes: {names}."
    for name, nodes in meant.items():
        if len(nodes) > 1:
            listed = ids_and_hosts(records[node] for node in nodes)
            return f"{begin}: several nodes are named {name}; name one by its id: {listed}."
    node, count = Counter(meant[name][0] for name, _ in ask.fixed).most_common(1)[0]
    if count > 1:
        return f"{begin}: {records[node].name} is named twice; a node has one range of layers."
    if snapshot.shape is not None and (wrong := miscounted(ask.fixed, len(snapshot.shape.layers))):
        return f"The layers of {snapshot.holders[0][1].name} can't be placed as named: {wrong}."
    return ""


def _rounded_up(ask: Ensure, snapshot: ClusterSnapshot, larger: Located, exact: Place) -> Place:
    """Reload with more context than requested if that has no cost.

    A growing conversation needs slightly more with each request.
    """
    context_train = snapshot.holders[0][1].context_train
    context = 1 << (ask.context - 1).bit_length() if ask.context > larger[1].context else 0
    context = min(context, context_train) if context_train else context
    if context <= ask.context:
        return exact
    rounded = _placement(replace(ask, context=context), snapshot, larger)
    if not isinstance(rounded, Place):
        return exact
    old_run, new_run = exact.plan.run, rounded.plan.run
    if (
        len(rounded.evictions) > len(exact.evictions)
        or (new_run.slots, new_run.ubatch) != (old_run.slots, old_run.ubatch)
        or len(rounded.plan.shares) > len(exact.plan.shares)
        or rounded.plan.tokens_per_second * 1.1 < exact.plan.tokens_per_second
    ):
        return exact
    why = f"More than the {ask.context} tokens requested, so that a growing conversation needs no reload."
    return replace(rounded, plan=replace(rounded.plan, reasons=(*rounded.plan.reasons, why)))


def _with_last_resort(
    ask: Ensure, snapshot: ClusterSnapshot, larger: Located | None, refusal: Refuse
) -> Place | PlaceLater | FetchFirst | Refuse:
    """Place on nodes that keep failing rather than on none, if the attempt unloads nothing."""
    kept = {node: why for node, why in snapshot.out.items() if node not in snapshot.last_resort}
    placed = _placement(ask, replace(snapshot, out=kept), larger)
    return refusal if isinstance(placed, Place) and placed.evictions else placed


def _defer_until_back(ask: Ensure, snapshot: ClusterSnapshot, refusal: Refuse) -> PlaceLater | Refuse:
    """Defer a refused placement if nodes that are away or left out only briefly would make it possible."""
    with_absent_nodes = snapshot.with_absent_nodes()
    if with_absent_nodes is None or ask.more or snapshot.blocked is not None:
        return refusal
    placed = _placement(ask, with_absent_nodes, None)
    if isinstance(placed, Refuse):
        return refusal
    place = placed if isinstance(placed, Place) else placed.place
    names = {record.node: record.name for record in with_absent_nodes.records}
    missing = {record.node for record in snapshot.expected} | snapshot.out.keys()
    needed = [node for node in place.plan.bytes_by_owner() if node in missing]
    awaited = sorted(f"{names[node]} ({snapshot.why_awaited(node)})" for node in needed)
    if not awaited:
        return refusal
    return PlaceLater(place, f"{place.plan.model} waits for {', '.join(awaited)}, needed to run it.")


def _placement(
    ask: Ensure, snapshot: ClusterSnapshot, larger: Located | None
) -> Place | PlaceLater | FetchFirst | Refuse:
    models = [(node, model) for node, model in snapshot.holders if runs_on_llama(model)]
    if not ask.llama or not models:
        return _no_llama(ask, snapshot)
    model = models[0][1]
    if snapshot.blocked is not None:
        return Refuse(
            Fault.UNAVAILABLE,
            f"{model.name} is not loaded now: {why_blocked(snapshot.blocked)}.",
            retry_after=snapshot.blocked.seconds,
        )
    if drained := _drain_reason(snapshot, models):
        return Refuse(Fault.UNAVAILABLE, drained, retry_after=10.0)
    builds = snapshot.builds()
    if not builds:
        live = {record.node: record for record in snapshot.records}
        setups = [
            f"{live[node].name}: {live[node].setup or 'not set up'}" for node, _ in models if node in live
        ]
        if not setups:
            return Refuse(Fault.UNAVAILABLE, f"No node with {model.name} is online.", retry_after=5.0)
        return Refuse(
            Fault.UNAVAILABLE,
            f"No node that has {model.name} has llama.cpp yet ({'; '.join(setups)}).",
            retry_after=15.0,
        )
    if snapshot.shape is None:
        why = f": {snapshot.unread}" if snapshot.unread else "."
        return Refuse(
            Fault.UNAVAILABLE, f"The header of {model.name} can't be read right now{why}", retry_after=5.0
        )
    refusal: Refuse | None = None
    for build in builds:
        placed = _place_on(ask, model, snapshot.shape, snapshot, build, larger)
        if larger is None and not ask.more:
            first = _fetch_first(ask, model, snapshot.shape, snapshot, build, placed)
            if first is not None:
                return first
        if not isinstance(placed, Refuse):
            return placed
        refusal = refusal or placed
    assert refusal is not None
    return refusal


def _drain_reason(snapshot: ClusterSnapshot, models: list[tuple[str, Model]]) -> str:
    """Return why the model can't be loaded if all nodes with its file are draining; empty if not all are."""
    holders = {node for node, _ in models}
    present = [record for record in snapshot.records if record.node in holders]
    if not present or not all(record.draining for record in present):
        return ""
    names = ", ".join(sorted(record.name for record in present))
    subject = (
        f"The only node with its file, {names}, is"
        if len(present) == 1
        else f"All nodes with its file ({names}) are"
    )
    return f"{models[0][1].name} can't be loaded now. {subject} draining; `sollold undrain NODE` ends that."


def _fetch_first(
    ask: Ensure,
    model: Model,
    shape: Shape,
    snapshot: ClusterSnapshot,
    build: str,
    placed: Place | PlaceLater | Refuse,
) -> FetchFirst | None:
    """Return a placement with another head if copying the file there first is better than ``placed``."""
    current: Candidate | None = None
    if not isinstance(placed, Refuse):
        current = (placed.place if isinstance(placed, PlaceLater) else placed).choice.candidate
    request = request_of(ask, model, snapshot)
    found = place_with_fetch(request, snapshot, build, partial(footprint_of, shape), model.size, current)
    if found is None:
        return None
    name = found.candidate.head.name
    why = "it fits nowhere else" if current is None else "running it there is worth the copy"
    message = f"{name} fetches the file of {model.name} first, {bytes_text(model.size)}: {why}."
    plan = found.candidate.plan(
        request, len(shape.layers), [*found.choice.reasons, message], windowed=shape.windowed
    )
    return FetchFirst(Place(plan, (), found.choice, found.fleet), model.name, model.digest, message)


def _no_llama(ask: Ensure, snapshot: ClusterSnapshot) -> Refuse:
    model = snapshot.holders[0][1]
    reason = next(
        (m.unusable or m.only_ollama for _, m in snapshot.holders if m.unusable or m.only_ollama), ""
    )
    if any(m.only_ollama for _, m in snapshot.holders) or not ask.llama:
        why = reason or "this request can only be answered by an Ollama"
        return Refuse(
            Fault.UNAVAILABLE,
            f"{model.name} can't be used now: {why.rstrip('.')}, and no Ollama that has it is available.",
            retry_after=10.0,
        )
    return Refuse(Fault.BAD_REQUEST, f"{model.name} can't be run: {reason or 'it has no file'}")


def _choose(
    request: PlacementRequest, fleet: Fleet, footprint_with: FootprintOf, snapshot: ClusterSnapshot
) -> PlacementChoice:
    """Return the best placement on a fleet, with drafts; on one machine if it can't be spread as required."""
    choice = choose(request, fleet, footprint_with, snapshot.correction)
    if choice.candidate is None and request.always:
        choice = choose(replace(request, always=False), fleet, footprint_with, snapshot.correction)
    if choice.candidate is None:
        return choice
    drafters, no_drafter = snapshot.drafters.get(request.speculation, ((), ""))
    candidate, note = with_drafts(
        choice.candidate,
        request,
        fleet,
        footprint_with,
        drafters,
        snapshot.draft_stats,
        snapshot.correction,
        no_drafter,
    )
    return replace(choice, candidate=candidate, reasons=(*choice.reasons, *([note] if note else [])))


def _place_on(
    ask: Ensure,
    model: Model,
    shape: Shape,
    snapshot: ClusterSnapshot,
    build: str,
    larger: Located | None,
) -> Place | PlaceLater | Refuse:
    """Place on the machines of one build, evicting idle deployments only where that is worth it."""
    request = request_of(ask, model, snapshot)
    footprint_with = partial(footprint_of, shape)
    replaced = [larger] if larger is not None else []

    def attempt(victims: list[Located], later: Bytes | None) -> PlacementChoice:
        fleet = snapshot.fleet(build, [*replaced, *victims], later=later)
        return _choose(request, fleet, footprint_with, snapshot)

    idle, busy = evictable(snapshot, {pair[1].id for pair in replaced})
    aim = context.tokens(request, shape.context_train)
    best = best_eviction(attempt, idle, snapshot, aim, evict=not ask.more)
    chosen, victims = best.choice, best.victims
    if chosen.candidate is None:
        if larger is not None and not missing_options(ask, larger[1], snapshot):
            return Refuse(Fault.TOO_BIG, f"{model.name}: {_no_room_for(ask, snapshot)}.")
        # Count memory that is being released: the decision considered it too, and it is free in a moment.
        roomiest = snapshot.fleet(build, [*replaced, *idle], later=snapshot.ending())
        others = busy, snapshot.correction, snapshot.away(build), snapshot.smaller
        # Where it can't be spread, it may run on one machine, as in `_choose`.
        alone_too = replace(request, always=False)
        return Refuse(
            Fault.TOO_BIG,
            f"{model.name} does not fit.",
            alternatives=chosen.alternatives,
            compute_shortfall=partial(explain, alone_too, roomiest, footprint_with, chosen, *others),
        )
    reasons = list(chosen.reasons)
    settings = snapshot.settings.placement
    if not (ask.type_k or shape.takes_cache(settings.type_k, settings.type_v)):
        reasons.append(f"Its KV cache is in f16: its heads of {shape.head_size} elements can't be quantized.")
    reasons += reasons_to_end(ask, snapshot, victims, larger)
    place = Place(
        chosen.candidate.plan(request, len(shape.layers), reasons, windowed=shape.windowed),
        tuple((record.node, endpoint.id, endpoint.model) for record, endpoint in [*replaced, *victims]),
        chosen,
        snapshot.fleet(build, replaced),
        pinned=larger is not None and larger[1].pinned,
    )
    if best.wait:
        return PlaceLater(place, f"{model.name} waits for memory that another deployment is releasing.")
    return place
