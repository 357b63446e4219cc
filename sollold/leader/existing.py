"""Finds what already serves a model: loaded, loading, or in an Ollama that can hold it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, Record, State
from sollold.facts import dataclass
from sollold.leader.messages import Ensure
from sollold.leader.snapshot import ClusterSnapshot, in_use, is_loading, runs_on_llama
from sollold.models.footprint.footprint import footprint
from sollold.models.model import Model
from sollold.placement import context
from sollold.placement.inventory import ollama_room
from sollold.placement.request import (
    AUTO,
    MOST_DEVICES,
    OFF,
    PlacementRequest,
    Policy,
    memory_needed,
    must_shard,
    normalised_speculation,
    profile_of,
)
from sollold.settings.schema import PlacementSettings

Located = tuple[Record, Endpoint]
"""An endpoint and the node that has it."""
OLLAMA_CONTEXT = 4096
"""Ollama's default context, in tokens."""


@dataclass(frozen=True, slots=True)
class Use:
    """``endpoint`` on ``node`` can serve the request now."""

    endpoint: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """``head`` is loading ``deployment``."""

    deployment: str
    head: str


@dataclass(frozen=True, slots=True)
class Mismatch:
    """It runs (or is loading) on ``node``, but not with the requested options, and can't be ended now."""

    endpoint: str
    node: str
    message: str


@dataclass(frozen=True, slots=True)
class ReloadWhenIdle:
    """It runs (or is loading) on ``node`` with less context than needed, and can't be ended now.

    ``located``: the endpoint and its node; None while it is loading.
    """

    endpoint: str
    node: str
    message: str
    located: Located | None = None


def unmet_options(ask: Ensure, asked: Asked, snapshot: ClusterSnapshot, slots: int = 0) -> str:
    """Return the requested options that a deployment was not started with, in words; empty when none.

    ``slots``: the deployment's actual slots, if known.
    """
    named = []
    if ask.slots and ask.slots not in (asked.slots, slots):
        named.append(f"{ask.slots} request{'s' if ask.slots != 1 else ''} at a time")
    if (ask.type_k and ask.type_k != asked.type_k) or (ask.type_v and ask.type_v != asked.type_v):
        named.append(f"a KV cache in {' and '.join(dict.fromkeys((ask.type_k, ask.type_v)))}")
    fixed = _with_names(ask.fixed, snapshot)
    if fixed and fixed != _with_names(asked.fixed, snapshot):
        named.append(f"the layers {', '.join(f'{node} {count}' for node, count in fixed)}")
    return ", ".join(named)


def _with_names(fixed: Sequence[tuple[str, int]], snapshot: ClusterSnapshot) -> tuple[tuple[str, int], ...]:
    """Return fixed layer counts with node names in place of ids, leaving out counts of 0."""
    names = {record.node: record.name for record in (*snapshot.records, *snapshot.expected)}
    return tuple((names.get(node, node), count) for node, count in fixed if count)


def missing_options(ask: Ensure, endpoint: Endpoint, snapshot: ClusterSnapshot) -> str:
    """Return the requested options, except context, that a deployment does not meet; empty when none."""
    sharded = must_shard(_placement_settings(ask, snapshot), snapshot.holders[0][1].parameters)
    lacks = [
        unmet_options(ask, endpoint.asked, snapshot, endpoint.slots),
        ask.placement.unmet_by(endpoint, sharded=sharded),
    ]
    return ", ".join(lack for lack in lacks if lack)


def _missing_of_accepted(ask: Ensure, asked: Asked, snapshot: ClusterSnapshot) -> str:
    """Do the same for an accepted deployment not in the records yet: only its requested options are known."""
    policy, workers = ask.placement.policy, ask.placement.workers
    lacks = [unmet_options(ask, asked, snapshot)]
    if policy and policy != asked.policy:
        lacks.append(f"the policy {policy}")
    if ask.placement.speculation and ask.placement.speculation != asked.speculation:
        lacks.append(f"speculation set to {ask.placement.speculation}")
    if workers is not None and asked.workers > workers:
        lacks.append(f"{workers} workers at most")
    return ", ".join(lack for lack in lacks if lack)


def with_options_of(ask: Ensure, asked: Asked) -> Ensure:
    """Return ``ask`` with the options it does not name taken from those of the deployment to be reloaded."""
    policy = ask.placement.policy or asked.policy
    fixed = ask.fixed or (() if ask.placement.policy else asked.fixed)
    speculation = ask.placement.speculation or asked.speculation
    return replace(
        ask,
        slots=ask.slots or asked.slots,
        type_k=ask.type_k or asked.type_k,
        type_v=ask.type_v or asked.type_v,
        placement=replace(ask.placement, policy=policy, speculation=speculation),
        fixed=fixed,
    )


def lost_lately(ask: Ensure, snapshot: ClusterSnapshot) -> Endpoint | None:
    """Return a deployment of this content that served until it failed or its head's node went, recently."""
    model = snapshot.holders[0][1]
    embedding = for_embedding(ask, model)
    broken = [e for _, e in snapshot.endpoints() if e.state is State.FAILED and e.answered]
    lost = [
        endpoint
        for endpoint in (*snapshot.lost, *broken)
        if endpoint.embedding == embedding
        and endpoint.backend is not Backend.OLLAMA
        and endpoint.is_of(model.name, model.digest, ask.in_ollama)
    ]
    return lost[-1] if lost and ask.llama else None


def as_it_ran(ask: Ensure, asked: Asked, usual: int) -> Ensure:
    """Return ``ask`` with the options it does not name taken from those of a lost deployment.

    ``usual``: the settings' context. If the deployment was started with it, no context is named, since a
    named one can't be reduced.
    """
    named = asked.context if asked.context != usual else 0
    return replace(with_options_of(ask, asked), context=max(ask.context, named))


def _placement_settings(ask: Ensure, snapshot: ClusterSnapshot) -> PlacementSettings:
    return ask.placement.over(snapshot.settings.placement)


def request_of(ask: Ensure, model: Model, snapshot: ClusterSnapshot) -> PlacementRequest:
    """Return the request for the planner.

    If the settings name a KV type that this model can't have, it gets f16.
    """
    placement = _placement_settings(ask, snapshot)
    types = {"type_k": ask.type_k or placement.type_k, "type_v": ask.type_v or placement.type_v}
    if snapshot.shape is not None and not snapshot.shape.takes_cache(*types.values()):
        types = dict.fromkeys(types, "f16")
    return PlacementRequest(
        model=model.name,
        digest=model.digest,
        parameters=model.parameters,
        size=model.size,
        context=ask.context,
        usual=placement.context,
        slots=ask.slots or placement.slots,
        **types,
        ubatch=placement.ubatch,
        policy=Policy(placement.policy),
        workers=min(placement.max_workers, MOST_DEVICES),
        distributed=placement.enable_distributed,
        always=must_shard(placement, model.parameters),
        external=ask.placement.external,
        fixed=ask.fixed,
        embedding=for_embedding(ask, model),
        template=model.template,
        speculation=normalised_speculation(placement.speculation),
    )


def for_embedding(ask: Ensure, model: Model) -> bool:
    """Return whether the llama-server must be one for embeddings, which serves nothing else."""
    return ask.embedding or model.only_embeds


footprint_of = lru_cache(maxsize=256)(footprint)
"""Cached, since plans are computed again and again while callers wait."""


def context_needed(ask: Ensure, snapshot: ClusterSnapshot) -> int:
    """Return the context that a request needs, in tokens: the named or usual one, capped by the trained."""
    trained = snapshot.holders[0][1].context_train
    wanted = ask.context or snapshot.settings.placement.context
    return min(wanted, trained) if trained else wanted


def _lacks_context(ask: Ensure, needed: int, context: int, asked: Asked) -> bool:
    """Return whether a deployment has too little context.

    If the caller names none, a deployment that was started with enough but got less, since memory was short,
    suffices.
    """
    return context < needed and (bool(ask.context) or 0 < asked.context < needed)


def find_existing(
    ask: Ensure, snapshot: ClusterSnapshot
) -> Use | Wait | Mismatch | ReloadWhenIdle | Located | None:
    """Return what runs or is loading already.

    A `Located` is an idle deployment that has too little context or lacks a requested option.
    """
    model = snapshot.holders[0][1]
    embedding = for_embedding(ask, model)
    needed = context_needed(ask, snapshot)
    same = [
        (record, endpoint)
        for record, endpoint in _endpoints_of(ask, model, snapshot)
        if endpoint.backend is not Backend.OLLAMA and ask.llama and endpoint.embedding == embedding
    ]
    ready = [pair for pair in same if pair[1].state is State.READY]
    unmet_by = {endpoint.id: missing_options(ask, endpoint, snapshot) for _, endpoint in same}
    wide = [
        (record, endpoint)
        for record, endpoint in ready
        if not unmet_by[endpoint.id] and not _lacks_context(ask, needed, endpoint.context, endpoint.asked)
    ]
    if wide:
        record, endpoint = min(wide, key=_load)
        return Use(endpoint.id, record.node, "it is loaded there")
    loading = _find_loading(ask, snapshot, needed, [pair for pair in same if is_loading(pair[1])])
    if loading is not None:
        return loading
    if ready:
        record, endpoint = min(ready, key=lambda pair: (bool(unmet_by[pair[1].id]), *_load(pair)))
        if not in_use(endpoint) and endpoint.id not in snapshot.unwilling:
            return record, endpoint
        if lacks := unmet_by[endpoint.id]:
            return Mismatch(endpoint.id, record.node, f"{model.name} runs without {lacks} and is in use")
        message = f"{model.name} is in use with a context of {endpoint.context} tokens"
        return ReloadWhenIdle(endpoint.id, record.node, message, (record, endpoint))
    drafts = ask.placement.speculation not in ("", OFF, AUTO)
    named = unmet_options(ask, Asked(), snapshot) or ask.placement.policy == Policy.SPREAD or drafts
    if ask.ollama and not (named and runs_on_llama(model)):
        return in_ollama(ask, snapshot)
    return None


def _find_loading(
    ask: Ensure, snapshot: ClusterSnapshot, needed: int, endpoints: list[Located]
) -> Wait | Mismatch | ReloadWhenIdle | None:
    """Return what is loading: of ``endpoints`` and of the accepted deployments not in the records yet."""
    model = snapshot.holders[0][1]
    embedding = for_embedding(ask, model)
    loading = [
        (
            missing_options(ask, endpoint, snapshot),
            _lacks_context(ask, needed, endpoint.context, endpoint.asked),
            endpoint.context,
            record.node,
            endpoint.id,
        )
        for record, endpoint in endpoints
    ]
    loading += [
        (
            _missing_of_accepted(ask, accepted.plan.asked, snapshot),
            _lacks_context(ask, needed, accepted.plan.run.request_context, accepted.plan.asked),
            accepted.plan.run.request_context,
            accepted.plan.head,
            accepted.deployment,
        )
        for accepted in snapshot.accepted
        if (accepted.plan.digest, accepted.plan.template) == (model.digest, model.template)
        and ask.llama
        and accepted.plan.run.embedding == embedding
        and accepted.deployment not in snapshot.gone
        and any(record.node == accepted.plan.head for record in snapshot.records)
        and not any(endpoint.id == accepted.deployment for _, endpoint in snapshot.endpoints())
    ]
    if not loading:
        return None
    lacks, narrow, context, node, deployment = min(loading, key=lambda entry: (bool(entry[0]), entry[1]))
    if lacks:
        return Mismatch(deployment, node, f"{model.name} is being loaded without {lacks}")
    if narrow:
        message = f"{model.name} is being loaded with a context of {context} tokens"
        return ReloadWhenIdle(deployment, node, message)
    return Wait(deployment, node)


def in_ollama(ask: Ensure, snapshot: ClusterSnapshot, *, surely: bool = True) -> Use | None:
    """Return an Ollama that has the model loaded or can hold it; without ``surely``, any that has it."""
    model = snapshot.holders[0][1]
    ollamas = [
        (record, endpoint)
        for record, endpoint in _endpoints_of(ask, model, snapshot)
        if endpoint.backend is Backend.OLLAMA and endpoint.state is State.READY
    ]
    only_ollama = not ask.llama or not any(runs_on_llama(copy) for _, copy in snapshot.holders)
    sharded = must_shard(_placement_settings(ask, snapshot), model.parameters)
    if sharded and ask.placement.threshold is not None and not only_ollama and surely:
        return None
    fitting = [
        pair
        for pair in ollamas
        if pair[1].loaded
        or only_ollama
        or not surely
        or (not sharded and _fits_there(ask, model, pair[0], snapshot))
    ]
    if not fitting:
        return None
    record, endpoint = min(fitting, key=lambda pair: (not pair[1].loaded, *_load(pair), -pair[1].speed))
    if endpoint.loaded:
        why = "it is loaded in Ollama there"
    else:
        why = "it fits in Ollama there" if surely else "Ollama there has it, and nothing else can run it"
    return Use(endpoint.id, record.node, why)


def _endpoints_of(ask: Ensure, model: Model, snapshot: ClusterSnapshot) -> list[Located]:
    """Return all endpoints with this content, except closing ones and those on draining nodes."""
    return [
        (record, endpoint)
        for record, endpoint in snapshot.endpoints()
        if endpoint.is_of(model.name, model.digest, ask.in_ollama)
        and not (record.draining or endpoint.closing)
    ]


def _load(pair: Located) -> tuple[float, str]:
    _, endpoint = pair
    return (endpoint.active + endpoint.waiting) / max(1, endpoint.slots), endpoint.id


def _fits_there(ask: Ensure, model: Model, record: Record, snapshot: ClusterSnapshot) -> bool:
    """Return whether a machine's Ollama could hold the model if it unloaded all its idle models."""
    room = ollama_room(record)
    if snapshot.shape is None:
        profile = profile_of(snapshot.settings.models.profiles, model.name)
        if profile is not None and profile.requires_distributed:
            return False
        return max(model.size * 1.1, memory_needed(profile) if profile is not None else 0) <= room
    request = request_of(ask, model, snapshot)
    tokens = context.tokens(replace(request, usual=OLLAMA_CONTEXT), snapshot.shape.context_train)
    need = footprint_of(snapshot.shape, context.run_with(request, tokens, 1))
    return need.host_weights + sum(need.weights) + sum(need.state) <= room
