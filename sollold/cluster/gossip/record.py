"""What a node says of itself. Each node is the only writer of its own record."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass
from sollold.machine.device import Device
from sollold.machine.external_worker import ExternalWorker

OLLAMA_PREFIX = "ollama:"
"""Begins the id of an endpoint that is a model in a node's Ollama; the rest is the model's name there."""

NGRAM = "ngram"
"""In `Drafts.by`: tokens are drafted from repeats of the conversation's own text."""

MTP = "mtp"
"""Likewise: by the model's own layer for next-token prediction."""

MOST_CACHED, DIGEST_LENGTH = 12, 16
"""Models of which a record tells that their tensors are kept, and how much of their digests."""


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
    """Layers of an endpoint on one device, for people to read: ``first`` to ``last - 1``.

    ``resident``: bytes that its process really holds there, and ending it would free; -1: not known.
    """

    node: str
    device: str
    first: int
    last: int
    bytes: int
    resident: int = -1

    @property
    def freed(self) -> int:
        """Bytes that ending it would free."""
        return self.bytes if self.resident < 0 else min(self.resident, self.bytes)


@dataclass(frozen=True, slots=True)
class Asked:
    """How a deployment was asked to run, by its caller or by the settings: it may have got less.

    Part of every record, so it has what is compared with a later request, and no more.

    Attributes:
        slots: requests at a time. 0, like what else is empty: not known.
        type_k, type_v: of the KV cache.
        policy: how layers were shared out; ``workers``: machines besides the head at most.
        fixed: (node, layers) that the caller fixed; empty: the planner decided.
        context: tokens for each request; ``always``: it was to be spread over machines.
        speculation: how it was to draft tokens, as the setting ``placement.speculation`` says it.
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
    """Speculation of a deployment, and what came of it in all answers since it was loaded.

    Attributes:
        by: what drafts, `NGRAM`, `MTP` or a model's name; empty: there is no speculation.
        digest: the content of that model.
        length: tokens drafted at a time at most.
        tokens: generated, of which ``accepted`` were drafted; ``drafted``: with those that were rejected.
    """

    by: str = ""
    length: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    digest: str = ""

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that was accepted; 0.0 when none were drafted yet."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def with_answer(self, tokens: int, drafted: int, accepted: int) -> Drafts:
        """With one more answer counted."""
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
    """What Ollamas call a content.

    Attributes:
        names: under which it answers alike: an Ollama puts in the system text and the template of the name
            that it is asked by.
        manifests: Ollama's own digests, all that is known where the node can't read the files.
        template: fingerprint of the name's TEMPLATE, by which a llama-server must have been started.
    """

    names: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    template: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that answers for a model now (or soon): a head's llama-server, or an Ollama.

    Attributes:
        id: the deployment's id; `OLLAMA_PREFIX` and the name for a model in the node's Ollama.
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
    asked: Asked = field(default_factory=Asked)
    """Of a deployment of llama.cpp: a caller who names something else can tell."""
    closing: bool = False
    """It takes no new work, since a node that holds layers of it drains; what is in it may finish."""
    culprit: str = ""
    """Of FAILED: the node whose part failed; empty when that is not known."""
    crashed: bool = False
    """Of FAILED: a process of it ended by a fault of its own, not since somebody or the system killed it."""
    hung: bool = False
    """Of FAILED: its load, which was its head's alone, stood still, a minute of the callers' time."""
    forced: bool = False
    """Of DRAINING: somebody ends it with the requests in it, which are not to go on elsewhere."""
    cpu_moe: int = 0
    ready_since: float = 0.0
    """Of a deployment of llama.cpp: when it got READY, as a Unix time of its node; 0.0: it is not."""
    template: str = ""
    """Fingerprint of the TEMPLATE with which its llama-server was started; empty: the file's own."""
    drafts: Drafts = field(default_factory=Drafts)

    def is_of(self, model: str, digest: str, in_ollama: InOllama) -> bool:
        """Whether it answers for this content, which goes before the name: the same content may have
        another name on another node, and one name other content.
        """
        if not self.digest or not digest:
            return self.model.lower() == model.lower()
        if self.backend is not Backend.OLLAMA:
            return self.digest == digest and self.template == in_ollama.template
        same = self.digest == digest or self.digest in in_ollama.manifests
        name = self.model.lower()
        return same and (name == model.lower() or any(name == other.lower() for other in in_ollama.names))


@dataclass(frozen=True, slots=True)
class WaitingMachine:
    """A machine that asks to be admitted. ``code``: to compare with what that machine shows. ``evicted``: an
    admin evicted it earlier."""

    node: str
    name: str
    code: str
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """All that a node tells the others. Merged by the greatest (version, boot), see `registry`.

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
        draining: takes no new work; ``empty``: and nothing is under way there any more.
        cached: (beginning of a model's digest, bytes of its tensors that workers here have kept on disk).
        links: measured (peer node id, round trip in seconds, bytes per second).
        plain: workers that others started and the node's settings name, used or not.
        waiting: machines that ask this node to be admitted to the cluster.
        door_until: Unix time, by this node's clock, until which whoever asks it is admitted; 0.0: an admin
            decides. Another one's clock may say otherwise: what is not 0 is open.
        seeking: where this node itself waits for admission, a sentence; empty when it does not.
        inviting: of an invitation that is open here or was withdrawn, the end of a sentence; empty: none.
        admitted_by: id of the node that let this one in; empty for a founder and with a token.
        keys: digest of the API keys that the node knows; empty: none.
        tls: other machines reach its API by HTTPS alone.
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
        """Where people reach the node."""
        host = self.addresses[0] if self.addresses else "127.0.0.1"
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.http_port}"
