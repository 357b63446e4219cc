"""What is there already for a model: loaded, loading, or in an Ollama that can hold it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sollold.cluster.record import Asked, Backend, Endpoint, Record, State
from sollold.leader.ensure import Ensure
from sollold.leader.world import World, in_use, is_loading, runs_on_llama
from sollold.models.footprint import Footprint, footprint
from sollold.models.model import Model
from sollold.models.run import Run
from sollold.models.shape import Shape
from sollold.placement import context
from sollold.placement.ollama_room import ollama_room
from sollold.placement.profile import needed, profile_of
from sollold.placement.wish import MOST_DEVICES, Policy, Wish, must_shard

Held = tuple[Record, Endpoint]
"""An endpoint and the node that has it."""
OLLAMA_CONTEXT = 4096
"""Tokens that Ollama gives when nobody names a number."""


@dataclass(frozen=True, slots=True)
class Use:
    """``endpoint`` on ``node`` answers now."""

    endpoint: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """``deployment`` is being loaded by ``head``."""

    deployment: str
    head: str


@dataclass(frozen=True, slots=True)
class Otherwise:
    """It runs (or loads) on ``node``, but not as the caller named, and can't be ended just now."""

    endpoint: str
    node: str
    message: str


def unmet(ask: Ensure, asked: Asked, slots: int = 0) -> str:
    """What the caller named that a deployment was not asked for, in a few words; empty: nothing.

    ``slots``: requests at a time that it has, where that is known.
    """
    named = []
    if ask.slots and ask.slots not in (asked.slots, slots):
        named.append(f"{ask.slots} request{'s' if ask.slots != 1 else ''} at a time")
    if (ask.type_k and ask.type_k != asked.type_k) or (ask.type_v and ask.type_v != asked.type_v):
        named.append(f"keys and values in {' and '.join(dict.fromkeys((ask.type_k, ask.type_v)))}")
    if ask.policy and ask.policy != asked.policy:
        named.append(f"the policy {ask.policy}")
    if ask.workers and min(ask.workers, MOST_DEVICES) != asked.workers:
        named.append(f"{ask.workers} worker{'s' if ask.workers != 1 else ''} at most")
    fixed = tuple(pair for pair in ask.fixed if pair[1])
    if fixed and fixed != asked.fixed:
        named.append(f"the layers {', '.join(f'{node} {count}' for node, count in fixed)}")
    return ", ".join(named)


def wish_of(ask: Ensure, model: Model, world: World) -> Wish:
    """What the planner is asked for."""
    placement = world.settings.placement
    return Wish(
        model=model.name,
        digest=model.digest,
        parameters=model.parameters,
        size=model.size,
        context=ask.context,
        usual=placement.context,
        slots=ask.slots or placement.slots,
        type_k=ask.type_k or placement.type_k,
        type_v=ask.type_v or placement.type_v,
        ubatch=placement.ubatch,
        policy=Policy(ask.policy or placement.policy),
        workers=min(ask.workers or placement.max_workers, MOST_DEVICES),
        distributed=placement.enable_distributed,
        always=must_shard(placement, model.parameters),
        fixed=ask.fixed,
        embedding=for_embedding(ask, model),
    )


def for_embedding(ask: Ensure, model: Model) -> bool:
    """Whether its llama-server must be one for embeddings: then it does nothing else."""
    return ask.embedding or ("embedding" in model.capabilities and "completion" not in model.capabilities)


@lru_cache(maxsize=256)
def footprint_of(shape: Shape, run: Run) -> Footprint:
    """The footprint, remembered: a plan is asked for again and again while callers wait."""
    return footprint(shape, run)


def what_is_there(ask: Ensure, world: World) -> Use | Wait | Otherwise | Held | None:
    """What runs or loads already. A pair: an idle deployment whose context is too small for this, or that
    does not run as the caller named."""
    model = world.holders[0][1]
    embedding = for_embedding(ask, model)
    same = _endpoints_of(ask, model, world)
    ready = [
        (record, endpoint)
        for record, endpoint in same
        if endpoint.backend is not Backend.OLLAMA
        and ask.llama
        and endpoint.state is State.READY
        and endpoint.embedding == embedding
    ]
    needed = min(ask.context, model.context_train) if model.context_train else ask.context
    otherwise = {endpoint.id: unmet(ask, endpoint.asked, endpoint.slots) for _, endpoint in same}
    wide = [pair for pair in ready if pair[1].context >= needed and not otherwise[pair[1].id]]
    if wide:
        record, endpoint = min(wide, key=_line)
        return Use(endpoint.id, record.node, "it is loaded there")
    loading = [
        (record.node, endpoint.id, otherwise[endpoint.id])
        for record, endpoint in same
        if endpoint.backend is not Backend.OLLAMA
        and ask.llama
        and is_loading(endpoint)
        and endpoint.embedding == embedding
    ] + [
        (promise.head, promise.deployment, unmet(ask, promise.asked))
        for promise in world.promises
        if promise.digest == model.digest
        and ask.llama
        and promise.embedding == embedding
        and promise.deployment not in world.gone
        and any(record.node == promise.head for record in world.records)
        and not any(e.id == promise.deployment for _, e in world.endpoints())
    ]
    if loading:
        head, deployment, lacks = min(loading, key=lambda one: bool(one[2]))
        if lacks:
            return Otherwise(deployment, head, f"{model.name} is just being loaded without {lacks}")
        return Wait(deployment, head)
    if ready:
        record, endpoint = min(ready, key=lambda pair: (bool(otherwise[pair[1].id]), *_line(pair)))
        if not in_use(endpoint) and endpoint.id not in world.unwilling:
            return record, endpoint
        if lacks := otherwise[endpoint.id]:
            return Otherwise(endpoint.id, record.node, f"{model.name} runs without {lacks} and is in use")
        return Use(endpoint.id, record.node, f"it is in use with a context of {endpoint.context} tokens")
    if ask.ollama and not (unmet(ask, Asked()) and runs_on_llama(model)):
        return in_ollama(ask, world)
    return None


def in_ollama(ask: Ensure, world: World, *, surely: bool = True) -> Use | None:
    """An Ollama that has the model, loaded or able to hold it; not ``surely``: or just offering it."""
    model = world.holders[0][1]
    ours = [
        (record, endpoint)
        for record, endpoint in _endpoints_of(ask, model, world)
        if endpoint.backend is Backend.OLLAMA and endpoint.state is State.READY
    ]
    only = not ask.llama or not any(runs_on_llama(one) for _, one in world.holders)
    sharded = must_shard(world.settings.placement, model.parameters)
    fitting = [
        pair
        for pair in ours
        if pair[1].loaded or only or not surely or (not sharded and _fits_there(ask, model, pair[0], world))
    ]
    if not fitting:
        return None
    record, endpoint = min(fitting, key=lambda pair: (not pair[1].loaded, *_line(pair), -pair[1].speed))
    if endpoint.loaded:
        why = "it is loaded in the Ollama there"
    else:
        why = "it fits the Ollama there" if surely else "the Ollama there has it, and nothing else can run it"
    return Use(endpoint.id, record.node, why)


def _endpoints_of(ask: Ensure, model: Model, world: World) -> list[Held]:
    """All that has this content on nodes that take work."""
    return [
        (record, endpoint)
        for record, endpoint in world.endpoints()
        if endpoint.is_of(model.name, model.digest, ask.in_ollama)
        and not (record.draining or endpoint.closing)
        and record.node not in ask.exclude
    ]


def _line(pair: Held) -> tuple[float, str]:
    _, endpoint = pair
    return (endpoint.active + endpoint.waiting) / max(1, endpoint.slots), endpoint.id


def _fits_there(ask: Ensure, model: Model, record: Record, world: World) -> bool:
    """Whether a machine could hold it alone if all that is idle in its Ollama made room."""
    room = ollama_room(record)
    if world.shape is None:
        profile = profile_of(world.settings.models.profiles, model.name)
        if profile is not None and profile.requires_distributed:
            return False
        return max(model.size * 1.1, needed(profile) if profile is not None else 0) <= room
    wish = wish_of(ask, model, world)
    tokens = context.tokens(replace(wish, usual=OLLAMA_CONTEXT), world.shape.context_train)
    need = footprint_of(world.shape, context.run_with(wish, tokens, 1))
    return need.host_weights + sum(need.weights) + sum(need.state) <= room
