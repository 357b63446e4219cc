"""Which endpoint answers a request, as ``_routing`` says it, with the caller's warnings. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.gossip.record import Endpoint, Record
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, engine_of
from sollold.serving.context_size import context_warning, no_more_context
from sollold.serving.draft_warnings import logprobs_warning, undrafted_warning
from sollold.serving.request import Ask, Engine, Routing


def routing_of(model: str, record: Record, endpoint: Endpoint, records: Iterable[Record]) -> Routing:
    """The routing for an endpoint of ``record``'s node; ``records`` give the other nodes their names."""
    names = {other.node: other.name or other.node for other in records} if endpoint.placed else {}
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
    """What the caller gets less of than asked for, where ``candidate`` answers."""
    endpoint = candidate.endpoint
    undrafted = "" if ask.embedding else undrafted_warning(query.placement, endpoint)
    if candidate.engine is Engine.OLLAMA:
        more = 0 < query.trained < ask.context
        context = no_more_context(ask.context, query.model, query.trained) if more else ""
        return tuple(warning for warning in (context, undrafted) if warning)
    if ask.embedding:
        return ()
    warnings = (
        context_warning(ask.context, endpoint, query.trained),
        logprobs_warning(ask.calls[Engine.LLAMA].body, endpoint.drafts),
        undrafted,
    )
    return tuple(warning for warning in warnings if warning)
