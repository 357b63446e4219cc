"""What is there already for a model: loaded, loading, or in an Ollama that can hold it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sollold.cluster.record import Backend, Endpoint, Record, State
from sollold.leader.ensure import Ensure
from sollold.leader.world import World, in_use, is_loading, runs_on_llama
from sollold.models.footprint import Footprint, footprint
from sollold.models.model import Model
from sollold.models.run import Run
from sollold.models.shape import Shape
from sollold.placement import context
from sollold.placement.wish import MOST_DEVICES, Policy, Wish

Held = tuple[Record, Endpoint]
"""An endpoint and the node that has it."""


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


def wish_of(ask: Ensure, model: Model, world: World) -> Wish:
    """What the planner is asked for."""
    placement = world.settings.placement
    threshold = placement.distributed_threshold
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
        always=placement.enable_distributed and 0 < threshold <= model.parameters / 1e9,
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


def what_is_there(ask: Ensure, world: World) -> Use | Wait | Held | None:
    """What runs or loads already. A pair: an idle deployment whose context is too small for this."""
    model = world.holders[0][1]
    embedding = for_embedding(ask, model)
    same = [
        (record, endpoint)
        for record, endpoint in world.endpoints()
        if endpoint.is_of(model.name, model.digest, ask.in_ollama)
        and not record.draining
        and record.node not in ask.exclude
    ]
    ready = [
        (record, endpoint)
        for record, endpoint in same
        if endpoint.backend is not Backend.OLLAMA
        and ask.llama
        and endpoint.state is State.READY
        and endpoint.embedding == embedding
    ]
    needed = min(ask.context, model.context_train) if model.context_train else ask.context
    wide = [pair for pair in ready if pair[1].context >= needed]
    if wide:
        record, endpoint = min(wide, key=_line)
        return Use(endpoint.id, record.node, "it is loaded there")
    loading = [
        (record.node, endpoint.id)
        for record, endpoint in same
        if endpoint.backend is not Backend.OLLAMA
        and ask.llama
        and is_loading(endpoint)
        and endpoint.embedding == embedding
    ] + [
        (promise.head, promise.deployment)
        for promise in world.promises
        if promise.digest == model.digest
        and ask.llama
        and promise.embedding == embedding
        and promise.deployment not in world.gone
        and any(record.node == promise.head for record in world.records)
        and not any(e.id == promise.deployment for _, e in world.endpoints())
    ]
    if loading:
        return Wait(loading[0][1], loading[0][0])
    if ready:
        record, endpoint = min(ready, key=_line)
        if in_use(endpoint) or endpoint.id in world.unwilling:
            return Use(endpoint.id, record.node, f"it is in use with a context of {endpoint.context} tokens")
        return record, endpoint
    if ask.ollama:
        return _in_ollama(model, same, world)
    return None


def _line(pair: Held) -> tuple[float, str]:
    _, endpoint = pair
    return (endpoint.active + endpoint.waiting) / max(1, endpoint.slots), endpoint.id


def _in_ollama(model: Model, same: list[Held], world: World) -> Use | None:
    """An Ollama that has the model, loaded or able to hold it."""
    ours = [
        (record, endpoint)
        for record, endpoint in same
        if endpoint.backend is Backend.OLLAMA and endpoint.state is State.READY
    ]
    only = not any(runs_on_llama(one) for _, one in world.holders)
    fitting = [pair for pair in ours if pair[1].loaded or only or _fits_there(model, pair[0], world)]
    if not fitting:
        return None
    record, endpoint = min(fitting, key=lambda pair: (not pair[1].loaded, *_line(pair), -pair[1].speed))
    why = "it is loaded in the Ollama there" if endpoint.loaded else "it fits the Ollama there"
    return Use(endpoint.id, record.node, why)


def _fits_there(model: Model, record: Record, world: World) -> bool:
    """Whether a machine could hold it alone if all that is idle in its Ollama made room."""
    room = sum(device.available for device in record.devices)
    idle = [e for e in record.endpoints if e.backend is Backend.OLLAMA and e.loaded and not in_use(e)]
    room += sum(one.bytes for one in idle)
    if world.shape is None:
        return model.size * 1.1 <= room
    least = context.run_with(wish_of(Ensure(model.name), model, world), context.LEAST, 1)
    need = footprint_of(world.shape, least)
    return need.host_weights + sum(need.weights) + sum(need.state) <= room
