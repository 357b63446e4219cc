"""Describes the answering endpoint to callers, with warnings where they get less than requested. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from sollold.cluster.gossip.record import Backend, Endpoint, Record
from sollold.leader.messages import Ensure
from sollold.leader.wish import PlacementWish
from sollold.placement.request import AUTO, OFF
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, engine_of
from sollold.serving.request import Ask, Engine, Routing

_PROBABILITIES = ("n_probs", "logprobs", "top_logprobs")


def routing_of(model: str, record: Record, endpoint: Endpoint, records: Iterable[Record]) -> Routing:
    """The routing for an endpoint of ``record``'s node; ``records`` provide the names of the other nodes."""
    names = {peer.node: peer.name or peer.node for peer in records} if endpoint.placed else {}
    return Routing(
        backend=endpoint.backend,
        engine=engine_of(endpoint),
        model=model,
        node=record.name or record.node,
        coordinator_url=record.url,
        devices=tuple(
            f"{names.get(placed.node, placed.node)}/{placed.device}"
            for placed in endpoint.placed
            if placed.last > placed.first
        ),
        drafts=endpoint.drafts,
    )


def warnings_of(ask: Ask, query: EndpointQuery, candidate: EndpointCandidate) -> tuple[str, ...]:
    """Warnings about what the caller gets less of than requested when ``candidate`` answers."""
    endpoint, warnings = candidate.endpoint, []
    if candidate.engine is Engine.OLLAMA:
        if 0 < query.trained < ask.context:
            warnings.append(_trained_context_warning(ask.context, query.model, query.trained))
    elif not ask.embedding:
        if 0 < endpoint.context < ask.context:
            warnings.append(_context_warning(ask.context, endpoint, query.trained))
        if endpoint.drafts.by:
            warnings.append(_logprobs_warning(ask.calls[Engine.LLAMA].body))
    if not ask.embedding:
        warnings.append(_undrafted_warning(query.placement, endpoint))
    return tuple(filter(None, warnings))


def load_warnings(ask: Ensure, endpoint: Endpoint) -> tuple[str, ...]:
    """Warnings about what a load gave less of than requested, one sentence each."""
    undrafted = "" if endpoint.embedding else _undrafted_warning(ask.placement, endpoint)
    if endpoint.backend is Backend.OLLAMA:
        return (undrafted,) if undrafted else ()
    warnings = []
    if 0 < endpoint.context < ask.context:
        warnings.append(_trained_context_warning(ask.context, endpoint.model, endpoint.context))
    if endpoint.slots < ask.slots:
        warnings.append(f"{ask.slots} slots were requested, but there is room for only {endpoint.slots}")
    if undrafted:
        warnings.append(undrafted)
    return tuple(warnings)


def _context_warning(requested: int, endpoint: Endpoint, trained: int) -> str:
    """The warning for an endpoint with less context than requested."""
    if 0 < trained <= endpoint.context:
        return _trained_context_warning(requested, endpoint.model, endpoint.context)
    return f"the context has {endpoint.context} tokens instead of the requested {requested}: more do not fit"


def _trained_context_warning(asked: int, model: str, size: int) -> str:
    """The same for a model trained with a context of ``size`` tokens."""
    return f"the context has {size} tokens instead of the requested {asked}: {model} was trained with no more"


def _logprobs_warning(body: Mapping[str, Any]) -> str:
    """A warning if a drafting endpoint's token probabilities, if requested, will be incomplete; else empty.

    llama-server computes none for accepted draft tokens, and reports a logprob of 0.0 for them.
    """
    if not any(body.get(name) for name in _PROBABILITIES):
        return ""
    return (
        "draft tokens have no probabilities: their logprob is reported as 0.0. "
        "Load the model with speculation off to get them"
    )


def _undrafted_warning(wish: PlacementWish, endpoint: Endpoint) -> str:
    """A warning if tokens are not drafted in the way that the caller requested; empty if they are.

    ``wish``: names a draft model by the model's own name.
    """
    wanted, drafter = wish.speculation, endpoint.drafts.by
    if wanted in ("", OFF, AUTO, drafter):
        return ""
    status = f"tokens are drafted by {drafter}" if drafter else "no tokens are drafted"
    warning = f"{status}, although speculation {wanted!r} was requested"
    if endpoint.backend is Backend.OLLAMA:
        return f"{warning}: an Ollama answers"
    if endpoint.reason:
        return f"{warning}: {endpoint.reason}"
    words = shlex.join(("sollold", "plan", endpoint.model, "--speculation", wanted))
    return f"{warning}; `{words}` shows why"
