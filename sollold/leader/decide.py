"""What is to be done for a model: use what runs, wait for what loads, place it, or refuse. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from sollold.cluster.record import Backend, Endpoint, State
from sollold.leader.ensure import Ensure
from sollold.leader.fetch_first import elsewhere
from sollold.leader.reuse import (
    Held,
    Otherwise,
    Use,
    Wait,
    footprint_of,
    in_ollama,
    unmet,
    what_is_there,
    wish_of,
)
from sollold.leader.world import Bytes, World, in_use, is_loading, runs_on_llama, why_blocked
from sollold.models.model import Model
from sollold.models.shape import Shape
from sollold.placement import context
from sollold.placement.draft import Draft
from sollold.placement.fleet import Fleet
from sollold.placement.plan import Plan
from sollold.placement.planner import Choice, choose
from sollold.placement.rung import Alternative
from sollold.placement.share_out import miscounted
from sollold.placement.shortfall import Busy, Shortfall, explain
from sollold.serving.ask import Fault
from sollold.units import bytes_text

IDLE_LONG = 60.0
"""Seconds of idleness after which a deployment is worth ending for a faster plan."""
FASTER = 1.5
"""How much faster that plan must be."""
SPARED = 16
"""Deployments at most for each of which it is tried whether the plan can do without its end."""


@dataclass(frozen=True, slots=True)
class Place:
    """Carry ``plan`` out after ending ``evictions`` (node, deployment, model)."""

    plan: Plan
    evictions: tuple[tuple[str, str, str], ...]
    choice: Choice
    fleet: Fleet


@dataclass(frozen=True, slots=True)
class Soon:
    """``place`` can be done when memory that is being given back is free, or who has just gone is back."""

    place: Place
    message: str


@dataclass(frozen=True, slots=True)
class FetchFirst:
    """``place`` can be done, and is worth it, when its head has fetched the file."""

    place: Place
    model: str
    digest: str
    message: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It can't be answered. ``shortfall``: the arithmetic, when memory is why.

    ``reckon``: gives that, which takes longer than the decision; done only for what is refused in the end.
    """

    fault: Fault
    message: str
    retry_after: float = 0.0
    shortfall: Shortfall | None = None
    alternatives: tuple[Alternative, ...] = ()
    reckon: Callable[[], Shortfall] | None = None


Decision = Use | Wait | Otherwise | Place | Soon | FetchFirst | Refuse


def decide(ask: Ensure, world: World) -> Decision:
    """The one decision. ``world.holders`` is not empty: the name was found."""
    if ask.fixed and (wrong := _misfixed(ask, world)):
        return Refuse(Fault.BAD_REQUEST, wrong)
    decision = _decide(ask, world)
    if isinstance(decision, Refuse) and decision.reckon is not None:
        shortfall = decision.reckon()
        return replace(decision, message=shortfall.message, shortfall=shortfall, reckon=None)
    return decision


def _decide(ask: Ensure, world: World) -> Decision:
    there = what_is_there(ask, world)
    larger: Held | None = None
    if isinstance(there, tuple):
        larger = there
    elif there is not None and not ask.more:
        return there
    placed = _placement(ask, world, larger)
    if isinstance(placed, Refuse) and world.avoided:
        world = replace(world, avoided={})
        placed = _placement(ask, world, larger)
    if isinstance(placed, Refuse) and world.last_resort:
        placed = _with_the_last(ask, world, larger, placed)
    if isinstance(placed, Place) and larger is not None:
        placed = _rounded_up(ask, world, larger, placed)
    if isinstance(placed, Refuse):
        if larger is not None and not _otherwise(ask, larger):
            record, endpoint = larger
            return Use(endpoint.id, record.node, f"a context of {ask.context} tokens does not fit anywhere")
        if there is not None and not isinstance(there, tuple):
            return there
        awaited = _when_all_are_back(ask, world, placed)
        if isinstance(awaited, Soon):
            return awaited
        # Better to let an Ollama try with what memory it finds than to answer nothing.
        if ask.ollama and not ask.more and (last := in_ollama(ask, world, surely=False)) is not None:
            return last
    if isinstance(placed, Place) and placed.evictions and ask.more and there is not None:
        return there if not isinstance(there, tuple) else placed
    return placed


def _misfixed(ask: Ensure, world: World) -> str:
    """Why the counts that the caller fixed can't be meant, whatever memory there is; empty: they can."""
    records = (*world.records, *world.expected)
    known = {name for record in records for name in (record.node, record.name)}
    if absent := [node for node, _ in ask.fixed if node not in known]:
        there = ", ".join(sorted(record.name for record in world.records))
        return f"The layers can't be placed as named: there is no node {' or '.join(absent)}, only {there}."
    if world.shape is not None and (wrong := miscounted(ask.fixed, len(world.shape.layers))):
        return f"The layers of {world.holders[0][1].name} can't be placed as named: {wrong}."
    return ""


def _rounded_up(ask: Ensure, world: World, larger: Held, exact: Place) -> Place:
    """Load anew with more context than was named where that costs nobody anything: callers whose
    conversation grows come back with a little more each time."""
    context_train = world.holders[0][1].context_train
    context = 1 << (ask.context - 1).bit_length() if ask.context > larger[1].context else 0
    context = min(context, context_train) if context_train else context
    if context <= ask.context:
        return exact
    more = _placement(replace(ask, context=context), world, larger)
    if not isinstance(more, Place):
        return exact
    was, now = exact.plan.run, more.plan.run
    if (
        len(more.evictions) > len(exact.evictions)
        or (now.slots, now.ubatch) != (was.slots, was.ubatch)
        or len(more.plan.shares) > len(exact.plan.shares)
        or more.plan.tokens_per_second * 1.1 < exact.plan.tokens_per_second
    ):
        return exact
    why = f"More than the {ask.context} tokens named: if they grow, it need not be loaded anew each time."
    return replace(more, plan=replace(more.plan, reasons=(*more.plan.reasons, why)))


def _otherwise(ask: Ensure, held: Held) -> str:
    """What the caller named that a deployment does not have besides its context."""
    return unmet(ask, held[1].asked, held[1].slots)


def _with_the_last(
    ask: Ensure, world: World, larger: Held | None, refusal: Refuse
) -> Place | Soon | FetchFirst | Refuse:
    """With nodes that fail again and again: better those than none, if nothing is unloaded for the try."""
    kept = {node: why for node, why in world.out.items() if node not in world.last_resort}
    placed = _placement(ask, replace(world, out=kept), larger)
    return refusal if isinstance(placed, Place) and placed.evictions else placed


def _when_all_are_back(ask: Ensure, world: World, refusal: Refuse) -> Soon | Refuse:
    """What is refused now, but could be done with nodes that have just gone or are left out for a moment."""
    hoped = world.hoped()
    if hoped is None or ask.more or world.blocked is not None:
        return refusal
    placed = _placement(ask, hoped, None)
    if isinstance(placed, Refuse):
        return refusal
    place = placed if isinstance(placed, Place) else placed.place
    names = {record.node: record.name for record in hoped.records}
    missing = {record.node for record in world.expected} | world.out.keys()
    awaited = sorted(names[node] for node in place.plan.bytes_by_owner() if node in missing)
    if not awaited:
        return refusal
    which = ", ".join(awaited)
    return Soon(place, f"{place.plan.model} waits for {which}: its memory is needed and has just gone.")


def _placement(ask: Ensure, world: World, larger: Held | None) -> Place | Soon | FetchFirst | Refuse:
    models = [(node, model) for node, model in world.holders if runs_on_llama(model)]
    if not ask.llama or not models:
        return _no_llama(ask, world)
    model = models[0][1]
    if world.blocked is not None:
        return Refuse(
            Fault.UNAVAILABLE,
            f"{model.name} is not loaded now: {why_blocked(world.blocked)}.",
            retry_after=world.blocked.seconds,
        )
    builds = world.builds()
    if not builds:
        live = {record.node: record for record in world.records}
        setups = [
            f"{live[node].name}: {live[node].setup or 'not set up'}" for node, _ in models if node in live
        ]
        if not setups:
            return Refuse(Fault.UNAVAILABLE, f"No node that has {model.name} is there now.", retry_after=5.0)
        return Refuse(
            Fault.UNAVAILABLE,
            f"No node that has {model.name} has llama.cpp yet ({'; '.join(setups)}).",
            retry_after=15.0,
        )
    if world.shape is None:
        return Refuse(
            Fault.UNAVAILABLE, f"The header of {model.name} can't be read just now.", retry_after=5.0
        )
    refusal: Refuse | None = None
    for build in builds:
        placed = _place_on(ask, model, world.shape, world, build, larger)
        if larger is None and not ask.more:
            first = _fetched(ask, model, world.shape, world, build, placed)
            if first is not None:
                return first
        if not isinstance(placed, Refuse):
            return placed
        refusal = refusal or placed
    assert refusal is not None
    return refusal


def _fetched(
    ask: Ensure, model: Model, shape: Shape, world: World, build: str, placed: Place | Soon | Refuse
) -> FetchFirst | None:
    """Another head, where having the file copied there first is better than ``placed``."""
    now: Draft | None = None
    if not isinstance(placed, Refuse):
        now = (placed.place if isinstance(placed, Soon) else placed).choice.draft
    wish = wish_of(ask, model, world)
    found = elsewhere(wish, world, build, partial(footprint_of, shape), model.size, now)
    if found is None:
        return None
    name = found.draft.head.name
    why = "nowhere else would it fit" if now is None else "it is worth the copy there"
    message = f"{name} fetches the file of {model.name} first, {bytes_text(model.size)}: {why}."
    plan = found.draft.plan(wish, len(shape.layers), [*found.choice.reasons, message])
    return FetchFirst(Place(plan, (), found.choice, found.fleet), model.name, model.digest, message)


def _no_llama(ask: Ensure, world: World) -> Refuse:
    model = world.holders[0][1]
    reason = next((m.unusable or m.only_ollama for _, m in world.holders if m.unusable or m.only_ollama), "")
    if any(m.only_ollama for _, m in world.holders) or not ask.llama:
        why = reason or "this request can only be answered by an Ollama"
        return Refuse(
            Fault.UNAVAILABLE,
            f"{model.name} can't be answered now: {why.rstrip('.')}, and no Ollama that has it can take it.",
            retry_after=10.0,
        )
    return Refuse(Fault.BAD_REQUEST, f"{model.name} can't be run: {reason or 'it has no file'}")


def _place_on(
    ask: Ensure,
    model: Model,
    shape: Shape,
    world: World,
    build: str,
    larger: Held | None,
) -> Place | Soon | Refuse:
    """Place on the machines of one build, ending idle deployments only where that is worth it."""
    wish = wish_of(ask, model, world)
    prints = partial(footprint_of, shape)
    must = [larger] if larger is not None else []
    fleet = world.fleet(build, must)

    def attempt(victims: list[Held], *, later: Bytes | None = None) -> Choice:
        on = world.fleet(build, [*must, *victims], later=later)
        choice = choose(wish, on, prints, world.correction)
        if choice.draft is None and wish.always:
            choice = choose(replace(wish, always=False), on, prints, world.correction)
        return choice

    idle, busy = _others(world, {pair[1].id for pair in must})
    free = attempt([])
    aim = context.tokens(wish, shape.context_train)
    chosen, victims = free, list[Held]()
    if idle and not ask.more and _worth_asking(free, aim, idle):
        long = [pair for pair in idle if pair[1].idle >= IDLE_LONG]
        allowed = idle if free.draft is None else long
        roomy = attempt(allowed) if allowed else free
        if roomy.draft is not None and (free.draft is None or _better(roomy, free, aim)):
            chosen, victims = _fewest(roomy, allowed, aim, attempt)
    soon = False
    if chosen.draft is None and (coming := world.ending()):
        victims = idle
        chosen, soon = attempt(victims, later=coming), True
    elif coming := world.ending(lately=True):
        # What failed just now holds its memory still: a worse plan would last, and this is over in a moment.
        roomy = attempt(victims, later=coming)
        if _worth_a_moment(roomy, chosen, aim):
            chosen, soon = roomy, True
    if chosen.draft is None and larger is not None and not _otherwise(ask, larger):
        return Refuse(Fault.TOO_BIG, f"{model.name} does not fit with {ask.context} tokens of context.")
    if chosen.draft is None:
        roomiest = world.fleet(build, [*must, *idle])
        reckon = partial(explain, wish, roomiest, prints, chosen, busy, world.correction)
        message = f"{model.name} does not fit."
        return Refuse(Fault.TOO_BIG, message, alternatives=chosen.alternatives, reckon=reckon)
    ended = [*must, *victims]
    reasons = list(chosen.reasons)
    for _, endpoint in victims:
        reasons.append(f"{endpoint.model}, idle, makes room.")
    if larger is not None:
        was = f"without {lacks}" if (lacks := _otherwise(ask, larger)) else f"with {larger[1].context} tokens"
        reasons.append(f"It was idle {was}, so it is loaded anew.")
    plan = chosen.draft.plan(wish, len(shape.layers), reasons)
    place = Place(
        plan, tuple((record.node, endpoint.id, endpoint.model) for record, endpoint in ended), chosen, fleet
    )
    if soon:
        return Soon(place, f"{model.name} waits for memory that another deployment is giving back.")
    return place


def _others(world: World, but: set[str]) -> tuple[list[Held], list[Busy]]:
    """Deployments that may be ended, those first that cost least; and those that may not."""
    idle: list[Held] = []
    busy: list[Busy] = []
    for record, endpoint in world.endpoints():
        ollama = endpoint.backend is Backend.OLLAMA
        if endpoint.id in but or endpoint.state is State.FAILED or (ollama and not endpoint.loaded):
            continue
        reason = _why_kept(endpoint, world)
        if not reason:
            idle.append((record, endpoint))
            continue
        busy.append(Busy(endpoint.id, endpoint.model, world.held(record, endpoint), reason))
    # What is ending anyway, then the longest idle, in steps of a minute; of those the one that is loaded
    # again the quickest.
    idle.sort(
        key=lambda pair: (
            pair[1].state is not State.DRAINING,
            -int(pair[1].idle // 60),
            pair[1].bytes,
            pair[1].id,
        )
    )
    return idle, busy


def _why_kept(endpoint: Endpoint, world: World) -> str:
    if in_use(endpoint):
        count = endpoint.active + endpoint.waiting
        return f"{count} request{'s are' if count != 1 else ' is'} in it"
    if endpoint.pinned:
        return "it is kept loaded by its keep_alive"
    if is_loading(endpoint):
        return "it is being loaded"
    if endpoint.id in world.unwilling:
        return "it has just been used"
    if endpoint.backend is Backend.OLLAMA and not world.settings.ollama.evict:
        return "the settings leave Ollama's models alone"
    return ""


def _worth_asking(free: Choice, aim: int, idle: list[Held]) -> bool:
    """Whether more room could change anything for the better."""
    if free.draft is None:
        return True
    if not any(endpoint.idle >= IDLE_LONG for _, endpoint in idle):
        return False
    return _context(free) < aim or not free.draft.alone or free.draft.on_host


def _better(roomy: Choice, free: Choice, aim: int) -> bool:
    """Whether ending idle deployments gives clearly more than what is free."""
    if roomy.draft is None or free.draft is None:
        return roomy.draft is not None
    if _context(free) < aim and _context(roomy) > _context(free):
        return True
    return roomy.draft.seconds * FASTER <= free.draft.seconds


def _worth_a_moment(roomy: Choice, chosen: Choice, aim: int) -> bool:
    """Whether memory that is about to be free gives a plan worth waiting for."""
    if _better(roomy, chosen, aim):
        return True
    assert roomy.draft is not None and chosen.draft is not None
    return _context(roomy) >= _context(chosen) and roomy.draft.run.slots > chosen.draft.run.slots


def _context(choice: Choice) -> int:
    assert choice.draft is not None
    return choice.draft.run.context // choice.draft.run.slots


def _fewest(
    best: Choice, idle: list[Held], aim: int, attempt: Callable[[list[Held]], Choice]
) -> tuple[Choice, list[Held]]:
    """End as few deployments as the plan can do with, those that cost least to lose first.

    The fewest of the first in line are found by halving, then those among them spared that are not needed.
    """

    def enough(victims: list[Held]) -> Choice | None:
        tried = attempt(victims)
        if tried.draft is None or best.draft is None:
            return None
        as_good = tried.draft.seconds <= best.draft.seconds * 1.1
        return tried if as_good and _context(tried) >= min(_context(best), aim) else None

    found, few, most = best, 0, len(idle)
    while most - few > 1:
        middle = (few + most) // 2
        tried = enough(idle[:middle])
        if tried is None:
            few = middle
        else:
            found, most = tried, middle
    victims = idle[:most]
    for pair in reversed(victims[-SPARED - 1 : -1]):
        fewer = [one for one in victims if one is not pair]
        tried = enough(fewer)
        if tried is not None:
            found, victims = tried, fewer
    return found, victims
