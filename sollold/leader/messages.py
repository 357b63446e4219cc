"""Messages between a node and the leader about a model, sent as peer calls."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from sollold.cluster.gossip.record import InOllama, State
from sollold.facts import dataclass
from sollold.leader.wish import PlacementWish


@dataclass(frozen=True, slots=True)
class Ensure:
    """Peer method ``ensure``: make an endpoint serve ``model``.

    It has only what the caller named; the leader's settings add the rest (`PlacementRequest`).

    Attributes:
        digest: digest of the content that the caller's node knows. If set, the leader waits briefly for a
            name that it does not know yet.
        in_ollama: names and digests of the content in Ollama.
        context: tokens that the request needs; 0: not named.
        keep_alive: seconds of idleness; negative: forever; None: as in the settings.
        embedding: whether it must serve embeddings.
        llama, ollama: whether the caller can use these engines.
        more: whether to add one more endpoint, since queues are long; this uses free memory only.
        slots, type_k, type_v: 0 or empty: as in the settings.
        placement: how to place it.
        waited: seconds since the caller's first attempt; if the load was cancelled since, the caller is told.
        fixed: (node, layers) in order, counting the output as a layer; empty: the planner decides.
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
    """The leader's verdict on an `Ensure`."""

    USE = "use"
    """``deployment`` on ``node`` can serve the request now."""
    WAIT = "wait"
    """The head ``node`` is loading ``deployment``."""
    PLANNING = "planning"
    """Nothing is ready yet: ask again in a moment."""
    REFUSED = "refused"
    """``fault`` and ``message`` say why."""
    ELSEWHERE = "elsewhere"
    """Ask ``leader`` instead; empty while there is none."""


@dataclass(frozen=True, slots=True)
class Ensured:
    """The response to `Ensure`. ``fault`` is a `sollold.errors.Fault`; ``retry_after``: seconds."""

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
        seen: (node, deployment) pairs that the caller sees; the leader's view may be slightly older.
    """

    model: str
    force: bool = False
    reason: str = "asked for"
    seen: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """The response to `Drop`.

    Attributes:
        ended: deployments that are gone.
        refused: (deployment, reason) pairs.
        forgotten: whether a lost model that was to stay loaded will not be reloaded.
        cancelled: whether a load that had not begun yet was cancelled.
    """

    ended: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    forgotten: bool = False
    cancelled: bool = False
    leader: str = ""
    """The node to ask instead; then nothing was unloaded. Empty if this one leads."""
