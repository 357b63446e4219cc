"""What a node asks the leader for a model, and what it is answered. Carried by peer calls."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.record import InOllama, State
from sollold.facts import dataclass
from sollold.leader.wish import PlacementWish


@dataclass(frozen=True, slots=True)
class Ensure:
    """Peer method ``ensure``: make something answer for ``model``.

    It says only what the caller named; the leader's settings add the rest (`PlacementRequest`).

    Attributes:
        digest: the content's, where the caller knows it; it goes before the name.
        in_ollama: what Ollamas call the content.
        context: tokens a request needs; 0: not named.
        keep_alive: seconds of idleness; negative: for ever; None: as the settings say.
        embedding: it must serve embeddings.
        llama, ollama: which engines the caller can use.
        more: one more endpoint than there is, since their queues are long; only free memory is used.
        slots, type_k, type_v: 0 or empty: as the settings say.
        placement: how it is to be placed.
        waited: seconds since the caller asked first; who waited when a load was cancelled hears so.
        fixed: (node, layers) in order, the output counted as one; empty: the planner decides.
    """

    model: str
    digest: str = ""
    context: int = 0
    keep_alive: float | None = None
    embedding: bool = False
    llama: bool = True
    ollama: bool = True
    more: bool = False
    slots: int = 0
    type_k: str = ""
    type_v: str = ""
    fixed: tuple[tuple[str, int], ...] = ()
    in_ollama: InOllama = field(default_factory=InOllama)
    placement: PlacementWish = field(default_factory=PlacementWish)
    waited: float = 0.0


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
    """The answer to `Ensure`. ``fault`` is a `sollold.errors.Fault`; ``retry_after``: seconds."""

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
    force: bool = False
    reason: str = "asked for"
    seen: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """``ended``: deployments that are gone; ``refused``: (deployment, why); ``forgotten``: one was lost that
    was to stay loaded, and is not loaded again; ``cancelled``: a load was that had not begun yet."""

    ended: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    forgotten: bool = False
    cancelled: bool = False
    leader: str = ""
    """Who to ask instead; then nothing was done."""
