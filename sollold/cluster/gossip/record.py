"""The record in which a node describes itself. Each node is the only writer of its own record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass
from sollold.machine.device import Device
from sollold.machine.external_worker import ExternalWorker

OLLAMA_PREFIX = "ollama:"
"""Prefix of the id of an endpoint that is a model in a node's Ollama; the model's name there follows."""

NGRAM = "ngram"
"""Value of `Drafts.by`: tokens are drafted from repetitions in the conversation."""

MTP = "mtp"
"""Value of `Drafts.by`: tokens are drafted by the model's own multi-token prediction layer."""

MOST_CACHED, DIGEST_LENGTH = 12, 16
"""Maximum number of models in `Record.cached`, and the length to which their digests are cut."""


class GrantState(StrEnum):
    """State of a grant. Reservations expire unless committed; commitments last while the head renews them."""

    RESERVED = "reserved"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Grant:
    """Bytes of one device reserved for one deployment."""

    deployment: str
    device: str
    bytes: int
    head: str
    state: GrantState


class State(StrEnum):
    """State of an endpoint. Only READY ones serve requests."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Backend(StrEnum):
    """Kind of engine; users see the values in ``_routing`` and ``X-Sollold-Backend``."""

    OLLAMA = "ollama-pool"
    SHARDED = "llama.cpp-distributed"
    LOCAL = "llama.cpp-local"


@dataclass(frozen=True, slots=True)
class Placed:
    """Layers of an endpoint on one device, for display: ``first`` to ``last - 1``.

    ``resident``: bytes that its process holds there, which would be freed if it ended; -1: unknown.
    """

    node: str
    device: str
    first: int
    last: int
    bytes: int
    resident: int = -1

    @property
    def freed(self) -> int:
        """Bytes that would be freed if it ended."""
        return self.bytes if self.resident < 0 else min(self.resident, self.bytes)


@dataclass(frozen=True, slots=True)
class Asked:
    """The options requested for a deployment, by its caller or by the settings; it may have got less.

    It is part of every record, so it has only what is compared with later requests.

    Attributes:
        slots: parallel requests. 0, like any other empty value: unknown.
        type_k, type_v: types of the KV cache.
        policy: how layers were distributed; ``workers``: maximum machines besides the head.
        fixed: (node, layers) fixed by the caller; empty: the planner decided.
        context: tokens per request; ``always``: it was to be spread over machines.
        speculation: requested speculation, as in the setting ``placement.speculation``.
    """

    slots: int = 0
    type_k: str = ""
    type_v: str = ""
    policy: str = ""
    workers: int = 0
    fixed: tuple[tuple[str, int], ...] = ()
    context: int = 0
    always: bool = False
    speculation: str = ""


@dataclass(frozen=True, slots=True)
class Drafts:
    """Speculative decoding of a deployment, and its results over all responses since it was loaded.

    Attributes:
        by: source of drafts: `NGRAM`, `MTP` or a model's name; empty: no speculation.
        digest: content digest of that model.
        length: maximum tokens drafted at a time.
        tokens: tokens generated, of which ``accepted`` were drafted; ``drafted`` includes rejected ones.
    """

    by: str = ""
    length: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    digest: str = ""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; 0.0 if none were drafted yet."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def with_answer(self, tokens: int, drafted: int, accepted: int) -> Drafts:
        """Return the counts with one more response added."""
        return Drafts(
            self.by,
            self.length,
            self.tokens + tokens,
            self.drafted + drafted,
            self.accepted + accepted,
            self.digest,
        )


@dataclass(frozen=True, slots=True)
class InOllama:
    """Names and digests of a model's content in Ollama.

    Attributes:
        names: names with equal behaviour: Ollama adds the system prompt and template of the requested name.
        manifests: Ollama's own digests, the only ones known if the node cannot read the files.
        template: fingerprint of the name's TEMPLATE, with which a llama-server must have been started.
    """

    names: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    template: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that serves a model now (or soon): a head's llama-server, or an Ollama.

    Attributes:
        id: the deployment's id; for a model in the node's Ollama `OLLAMA_PREFIX` and its name.
        progress: loading progress, 0.0 to 1.0.
        reason: if FAILED, why and what to do, as a sentence.
        context: tokens per request; ``slots``: parallel requests.
        active, waiting: requests in the engine and in the queue.
        speed: measured tokens per second of a single stream; 0.0: not measured yet.
        idle: seconds without a request when the record was written.
        loaded: its weights are in memory (always so for llama.cpp when READY).
        pinned: the caller asked to keep it loaded (keep_alive negative).
        bytes: memory it holds on all nodes.
        cpu_moe: number of first layers whose experts stay with the head's CPU.
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
    """Remaining idle seconds before it is unloaded; negative: never."""
    embedding: bool = False
    """It is a llama-server that serves only embeddings; an Ollama serves both."""
    answered: bool = False
    """It was READY once: if it is FAILED now, the failure was not in the load."""
    asked: Asked = field(default_factory=Asked)
    """Options of a llama.cpp deployment, to be compared with those of a later request."""
    closing: bool = False
    """It accepts no new work, since a participant drains or it is to be unloaded when idle."""
    culprit: str = ""
    """If FAILED: the node whose part failed; empty if unknown."""
    crashed: bool = False
    """If FAILED: one of its processes crashed by itself, rather than being killed by a user or the system."""
    hung: bool = False
    """If FAILED: its load stalled, and the head was the only participant. A retry may cost a minute again."""
    forced: bool = False
    """If DRAINING: it was ended on purpose with its requests, which must not continue elsewhere."""
    cpu_moe: int = 0
    ready_since: float = 0.0
    """Unix time, by its node's clock, when a llama.cpp deployment became READY; 0.0: it is not READY."""
    template: str = ""
    """Fingerprint of the TEMPLATE its llama-server was started with; empty: the file's own."""
    drafts: Drafts = field(default_factory=Drafts)

    def is_of(self, model: str, digest: str, in_ollama: InOllama) -> bool:
        """Whether it serves this content. Content takes precedence over the name: equal content may have
        another name on another node, and equal names different content.
        """
        if not self.digest or not digest:
            return self.model.lower() == model.lower()
        if self.backend is not Backend.OLLAMA:
            return self.digest == digest and self.template == in_ollama.template
        same = self.digest == digest or self.digest in in_ollama.manifests
        name = self.model.lower()
        return same and (name == model.lower() or any(name == alias.lower() for alias in in_ollama.names))


@dataclass(frozen=True, slots=True)
class WaitingMachine:
    """A machine that asks to be admitted. ``code``: to compare with the one that machine shows. ``evicted``:
    an admin evicted it earlier."""

    node: str
    name: str
    code: str
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that a node publishes about itself. Merged by the greatest (version, boot), see `registry`.

    Attributes:
        node: node id, 16 hex digits, never changes.
        name: host name, for display.
        version: raised by the writer with every change; survives restarts (kept above any seen).
        addresses: IP literals, the best first.
        build: llama.cpp build (``b11434``); empty if there is none. Only equal builds are combined.
        setup: state of llama.cpp's installation, for display; ``ready`` if there is one.
        models: digest of the model list, which is fetched over TCP when this changes.
        claim: the term in which this node leads or led last.
        open: the node uses the well-known token.
        draining: the node accepts no new work; ``empty``: and no work is left there.
        cached: (start of a model's digest, bytes of its tensors that workers here have cached on disk).
        links: measured (peer node id, round trip in seconds, bytes per second).
        plain: external workers named in the node's settings, used or not.
        waiting: machines that ask this node to be admitted to the cluster.
        door_until: Unix time, by this node's clock, until which every applicant is admitted; 0.0: an admin
            decides. Clocks may differ: on other nodes any value but 0 means open.
        seeking: while this node itself waits for admission, the rest of a sentence about it; else empty.
        inviting: state of an invitation that is open here or was withdrawn, likewise; empty: none.
        admitted_by: id of the node that admitted this one; empty for a founder and with a token.
        keys: digest of the API keys that the node knows; empty: none.
        tls: other machines must use HTTPS to reach its API.
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
    empty: bool = False
    links: tuple[tuple[str, float, float], ...] = ()
    cached: tuple[tuple[str, int], ...] = ()
    plain: tuple[ExternalWorker, ...] = ()
    waiting: tuple[WaitingMachine, ...] = ()
    door_until: float = 0.0
    seeking: str = ""
    inviting: str = ""
    admitted_by: str = ""
    keys: str = ""
    tls: bool = False

    @property
    def url(self) -> str:
        """Base URL of the node's HTTP API."""
        host = self.addresses[0] if self.addresses else "127.0.0.1"
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.http_port}"


def ids_and_hosts(records: Iterable[Record]) -> str:
    """List the ids of nodes that share a name, each with the address that shows which machine it is."""
    return ", ".join(f"{record.node} ({next(iter(record.addresses), '?')})" for record in records)
