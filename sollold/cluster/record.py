"""What a node says of itself. Each node is the only writer of its own record."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sollold.cluster.term import Term
from sollold.machine.device import Device


class GrantState(StrEnum):
    """A reservation expires unless committed; a commitment lives while its head renews it."""

    RESERVED = "reserved"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Grant:
    """Bytes of one device set aside for one deployment."""

    deployment: str
    device: str
    bytes: int
    head: str
    state: GrantState


class State(StrEnum):
    """An endpoint's life. Only READY answers requests."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Backend(StrEnum):
    """What answers; the words users see in ``_routing`` and ``X-Sollold-Backend``."""

    OLLAMA = "ollama-pool"
    SHARDED = "llama.cpp-distributed"
    LOCAL = "llama.cpp-local"


@dataclass(frozen=True, slots=True)
class Placed:
    """Layers of an endpoint on one device, for people to read: ``first`` to ``last - 1``."""

    node: str
    device: str
    first: int
    last: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that answers for a model now (or soon): a head's llama-server, or an Ollama.

    Attributes:
        id: the deployment's id; ``ollama:<model>`` for a model that the node's Ollama has.
        progress: of loading, 0.0 to 1.0.
        reason: of FAILED, a sentence with what to do.
        context: tokens a request may use; ``slots``: requests at a time.
        active, waiting: requests in the engine and in line.
        speed: tokens per second of a single stream, measured; 0.0 when not yet.
        idle: seconds without a request when the record was written.
        loaded: its weights are in memory (always so for llama.cpp when READY).
        pinned: the caller asked that it stays (keep_alive negative).
        bytes: memory it holds over all nodes.
        cpu_moe: of so many first layers the head's processor keeps the experts.
    """

    id: str
    model: str
    digest: str
    backend: Backend
    state: State
    progress: float = 0.0
    reason: str = ""
    context: int = 0
    slots: int = 1
    active: int = 0
    waiting: int = 0
    speed: float = 0.0
    idle: float = 0.0
    loaded: bool = True
    pinned: bool = False
    bytes: int = 0
    layers: int = 0
    placed: tuple[Placed, ...] = ()
    expires: float = 0.0
    """Seconds of idleness left before it is unloaded; negative: never."""
    embedding: bool = False
    """A llama-server that serves embeddings, and then nothing else; an Ollama serves both."""
    answered: bool = False
    """It was READY once: if it is FAILED now, it was not the load that failed."""
    cpu_moe: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """All that a node tells the others. Merged by (boot incarnation handled below, version): max wins.

    Attributes:
        node: id, 16 hex digits, kept on disk for ever.
        name: host name, for people.
        version: raised by the writer with every change; survives restarts (kept above any seen).
        addresses: IP literals, the best first.
        build: llama.cpp build (``b11434``); empty while there is none. Only equal builds mix.
        setup: what llama.cpp's set-up is doing, for people; ``ready`` when there is one.
        models: digest of the model list, which is fetched over TCP when this changes.
        claim: the term in which this node leads or led last.
        open: the node uses the well-known token.
        draining: takes no new work.
        links: measured (peer node id, round trip in seconds, bytes per second).
    """

    node: str
    name: str
    version: int
    addresses: tuple[str, ...]
    http_port: int
    peer_port: int
    release: str
    build: str = ""
    setup: str = ""
    devices: tuple[Device, ...] = ()
    models: str = ""
    claim: Term = field(default_factory=Term)
    grants: tuple[Grant, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    open: bool = True
    draining: bool = False
    links: tuple[tuple[str, float, float], ...] = ()
