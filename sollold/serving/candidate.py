"""Matches endpoints against the needs of a request. Pure."""

from __future__ import annotations

import msgspec

from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, Record, State
from sollold.leader.wish import PlacementWish
from sollold.machine.device import PROCESSOR, Kind
from sollold.placement.inventory import ollama_room
from sollold.serving.request import Engine

_MARGIN = 1.2
"""Memory that a model with a context of the usual size takes, relative to the size of its files."""

_USUAL_CONTEXT = 4096
"""Context in tokens up to which the margin includes it."""


class EndpointQuery(msgspec.Struct, frozen=True):
    """What a request needs of an endpoint. The leader is asked (`Ensure`) only if no endpoint matches.

    Attributes:
        context: context requested by the caller, in tokens; 0: not set.
        usual: default context in tokens; ``trained``: the model's trained context. 0: unknown.
        digest: digest of the model's content; takes precedence over its name.
        in_ollama: names and digests of the content in Ollama.
        size: size of the model's files in bytes; 0 if unknown.
        sharded: the model is to be spread over machines; no Ollama may load it for this request.
        placement: the caller's wishes for the placement.
        assigned: (node, endpoint) named by the leader, which knows better than the guesses made here.
    """

    model: str
    engines: frozenset[Engine]
    context: int = 0
    prefix: str = ""
    embedding: bool = False
    digest: str = ""
    in_ollama: InOllama = msgspec.field(default_factory=InOllama)
    size: int = 0
    sharded: bool = False
    assigned: tuple[str, str] = ("", "")
    usual: int = 0
    trained: int = 0
    placement: PlacementWish = msgspec.field(default_factory=PlacementWish)


class EndpointCandidate(msgspec.Struct, frozen=True):
    """An endpoint that could answer, with the facts that the rules use.

    ``key``: node and endpoint; ``engine``: the kind of engine; ``load``: requests in the engine and in its
    queue, including those of this node that its record does not contain yet.
    """

    key: tuple[str, str]
    engine: Engine
    record: Record
    endpoint: Endpoint
    local: bool
    gpu: bool
    load: int
    speed: float
    first_byte: float
    success: float
    sticky: bool

    @property
    def free(self) -> bool:
        """Whether a request would start at once."""
        return self.load < self.endpoint.slots


class ScoredCandidate(msgspec.Struct, frozen=True):
    """A candidate with its score and the reasons for it.

    ``marks``: words, mark (0 to 1) and weight of each rule; empty if no rules were applied (round robin or a
    sole candidate).
    """

    candidate: EndpointCandidate
    score: float
    marks: tuple[tuple[str, float, float], ...] = ()

    @property
    def why(self) -> str:
        """The score in words."""
        parts = (f"{words} {mark:.2f}×{weight:g}" for words, mark, weight in self.marks)
        return ", ".join(parts) or "round robin"


def engine_of(endpoint: Endpoint) -> Engine:
    """The kind of engine at an endpoint."""
    return Engine.OLLAMA if endpoint.backend is Backend.OLLAMA else Engine.LLAMA


def fits(endpoint: Endpoint, query: EndpointQuery, *, assigned: bool = False) -> bool:
    """Whether the endpoint has the model as the request needs it.

    ``assigned``: the leader named it, taking the caller's placement wishes into account.
    """
    if endpoint.state is not State.READY or endpoint.closing:
        return False
    if not endpoint.is_of(query.model, query.digest, query.in_ollama):
        return False
    engine = engine_of(endpoint)
    if engine not in query.engines:
        return False
    if engine is Engine.OLLAMA:
        return not (query.sharded and query.placement.threshold is not None)
    if endpoint.embedding != query.embedding or not _has_context(endpoint, query):
        return False
    return assigned or not query.placement.unmet_by(endpoint, sharded=query.sharded)


def _has_context(endpoint: Endpoint, query: EndpointQuery) -> bool:
    """Whether the context suffices. If the caller set none, it is enough that enough was requested at load.

    The endpoint may have got less then; the leader knows why.
    """
    if query.context:
        return endpoint.context >= query.context
    requested = endpoint.asked.context
    return not requested or max(requested, endpoint.context) >= query.usual


def has_room(record: Record, endpoint: Endpoint, query: EndpointQuery) -> bool:
    """Whether the endpoint can certainly answer without asking the leader first.

    A model that an Ollama has not loaded needs memory there. Only the leader knows the footprint; here it is
    estimated, and doubtful cases are left to the leader.
    """
    if endpoint.loaded or engine_of(endpoint) is Engine.LLAMA:
        return True
    return (
        not query.sharded and query.context <= _USUAL_CONTEXT and query.size * _MARGIN <= ollama_room(record)
    )


def on_gpu(record: Record, endpoint: Endpoint) -> bool:
    """Whether the endpoint computes on GPUs only, as far as known."""
    if endpoint.placed:
        return all(placed.device != PROCESSOR for placed in endpoint.placed if placed.last > placed.first)
    return any(device.kind is Kind.GPU for device in record.devices)
