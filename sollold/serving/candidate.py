"""What a request needs of an endpoint, and which endpoints have it. Pure."""

from __future__ import annotations

from dataclasses import field

from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, Record, State
from sollold.facts import dataclass
from sollold.leader.wish import PlacementWish
from sollold.machine.device import PROCESSOR, Kind
from sollold.placement.inventory import ollama_room
from sollold.serving.request import Engine

_MARGIN = 1.2
"""Bytes that a model takes for each of its files', with a context of the usual size."""

_USUAL_CONTEXT = 4096
"""Tokens up to which the margin holds the context too."""


@dataclass(frozen=True, slots=True)
class EndpointQuery:
    """What a request needs of an endpoint; the leader is asked for it (`Ensure`) only where none has it.

    Attributes:
        context: tokens that the caller named; 0: none.
        usual: tokens that are meant when none are named; ``trained``: those of the training. 0: unknown.
        digest: the content's; it goes before the name.
        in_ollama: what Ollamas call the content.
        size: bytes of the model's files; 0 when unknown.
        sharded: the settings want it spread over machines, whatever an Ollama could hold.
        placement: how the caller wants the model placed.
        told: (node, endpoint) that the leader named: it knows better than what is guessed here.
    """

    model: str
    engines: frozenset[Engine]
    context: int = 0
    prefix: str = ""
    embedding: bool = False
    digest: str = ""
    in_ollama: InOllama = field(default_factory=InOllama)
    size: int = 0
    sharded: bool = False
    told: tuple[str, str] = ("", "")
    usual: int = 0
    trained: int = 0
    placement: PlacementWish = field(default_factory=PlacementWish)


@dataclass(frozen=True, slots=True)
class EndpointCandidate:
    """An endpoint that could answer, and what the rules look at.

    ``key``: node and endpoint; ``engine``: who computes there; ``load``: requests in it and in its queue,
    ours that its record can't know yet included.
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
        """Whether a request would begin at once."""
        return self.load < self.endpoint.slots


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its score and why it has it.

    ``marks``: what counted, the mark from 0 to 1 and its weight; empty: its turn had come.
    """

    candidate: EndpointCandidate
    score: float
    marks: tuple[tuple[str, float, float], ...] = ()

    @property
    def why(self) -> str:
        """The score in words."""
        said = (f"{words} {mark:.2f}×{weight:g}" for words, mark, weight in self.marks)
        return ", ".join(said) or "round robin"


def engine_of(endpoint: Endpoint) -> Engine:
    """Who computes at an endpoint."""
    return Engine.OLLAMA if endpoint.backend is Backend.OLLAMA else Engine.LLAMA


def fits(endpoint: Endpoint, query: EndpointQuery, *, told: bool = False) -> bool:
    """Whether it has the model as the request needs it.

    ``told``: the leader named it, and weighed how the caller wants the model placed.
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
    return told or not query.placement.unmet_by(endpoint, sharded=query.sharded)


def _has_context(endpoint: Endpoint, query: EndpointQuery) -> bool:
    """Where none was named, an endpoint that was asked for enough and got less will do; the leader knows."""
    if query.context:
        return endpoint.context >= query.context
    asked = endpoint.asked.context
    return not asked or max(asked, endpoint.context) >= query.usual


def has_room(record: Record, endpoint: Endpoint, query: EndpointQuery) -> bool:
    """Whether it surely can answer without the leader being asked first.

    A model that an Ollama has not loaded needs room there. The leader knows the footprint; here it is
    guessed, and what is not clear is left to it.
    """
    if endpoint.loaded or engine_of(endpoint) is Engine.LLAMA:
        return True
    return (
        not query.sharded and query.context <= _USUAL_CONTEXT and query.size * _MARGIN <= ollama_room(record)
    )


def on_gpu(record: Record, endpoint: Endpoint) -> bool:
    """Whether it computes on GPUs alone, as far as that is known."""
    if endpoint.placed:
        return all(placed.device != PROCESSOR for placed in endpoint.placed if placed.last > placed.first)
    return any(device.kind is Kind.GPU for device in record.devices)
