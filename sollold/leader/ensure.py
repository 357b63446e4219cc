"""What a node asks the leader for a model, and what it is answered. Carried by peer calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sollold.cluster.record import InOllama, State
from sollold.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Ensure:
    """Peer method ``ensure``: make something answer for ``model``.

    Attributes:
        digest: the content's, where the caller knows it; it goes before the name.
        in_ollama: what Ollamas call the content.
        context: tokens a request needs; 0: not named.
        keep_alive: seconds of idleness; negative: for ever; None: as the settings say.
        embedding: it must serve embeddings.
        llama, ollama: which engines the caller can use.
        exclude: nodes that the caller has just seen fail.
        more: an endpoint more than there is, since their lines are long; only free memory is used.
        slots, type_k, type_v, policy: 0 or empty: as the settings say.
        workers: machines besides the head at most; 0: as the settings say.
        fixed: (node, layers) in order, the output counted as one; empty: the planner decides.
    """

    model: str
    digest: str = ""
    context: int = 0
    keep_alive: float | None = None
    embedding: bool = False
    llama: bool = True
    ollama: bool = True
    exclude: tuple[str, ...] = ()
    more: bool = False
    slots: int = 0
    type_k: str = ""
    type_v: str = ""
    policy: str = ""
    workers: int = 0
    fixed: tuple[tuple[str, int], ...] = ()
    in_ollama: InOllama = field(default_factory=InOllama)


class Verdict(StrEnum):
    """What the leader says."""

    USE = "use"
    """``deployment`` on ``node`` answers now."""
    WAIT = "wait"
    """``deployment`` is being loaded by its head ``node``."""
    PLANNING = "planning"
    """Room is still being made: ask again at once."""
    REFUSED = "refused"
    """``fault`` and ``message`` say why."""
    ELSEWHERE = "elsewhere"
    """``leader`` is who to ask; empty while there is none."""


@dataclass(frozen=True, slots=True)
class Ensured:
    """The answer to `Ensure`. ``fault`` is a `sollold.serving.ask.Fault`; ``retry_after``: seconds."""

    verdict: Verdict
    deployment: str = ""
    node: str = ""
    state: State = State.STARTING
    fault: str = ""
    message: str = ""
    retry_after: float = 0.0
    leader: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Peer method ``drop``: unload every deployment of ``model`` (a name, or a deployment's id).

    Attributes:
        seen: (node, deployment) of those that the caller sees; the leader's news may be a moment older.
    """

    model: str
    digest: str = ""
    force: bool = False
    reason: str = "asked for"
    seen: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """``ended``: deployments that are gone; ``refused``: (deployment, why)."""

    ended: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    leader: str = ""
    """Who to ask instead; then nothing was done."""


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes of a device before a plan and after it."""

    node: str
    name: str
    device: str
    total: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Option:
    """A placement that was considered and lost. ``tokens_per_second`` 0.0: it does not fit."""

    what: str
    tokens_per_second: float
    reason: str


@dataclass(frozen=True, slots=True)
class Missing:
    """Why it can't be placed: bytes, and what would help, the cheapest first."""

    needed: int
    there: int
    missing: int
    weights: int
    state: int
    buffers: int
    remedies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """What a load would do.

    Attributes:
        ok: it could be answered; ``message`` says how, or why not with the arithmetic.
        verdict: what the leader would say now.
        node, endpoint: what answers, where that is there already.
        plan: what would be placed; None when nothing would be.
        evicts: (deployment, model) that would be unloaded for it.
        prompt_tokens_per_second: predicted; 0.0 when unknown.
        context: tokens a request could use.
        weights, state, compute, overhead: bytes over all devices.
        free: each device that the plan uses.
        options: what lost, the fastest first.
        missing: the arithmetic when it does not fit.
    """

    ok: bool
    verdict: Verdict
    message: str
    node: str = ""
    endpoint: str = ""
    plan: Plan | None = None
    evicts: tuple[tuple[str, str], ...] = ()
    prompt_tokens_per_second: float = 0.0
    context: int = 0
    weights: int = 0
    state: int = 0
    compute: int = 0
    overhead: int = 0
    free: tuple[Free, ...] = ()
    options: tuple[Option, ...] = ()
    missing: Missing | None = None
    estimate: bool = False
