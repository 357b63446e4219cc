"""What the dialects need of the floors below, as Protocols; whoever wires the daemon gives them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sollold.api.findings import Finding
from sollold.cluster.record import Endpoint, Record
from sollold.cluster.term import Term
from sollold.machine.plain import PlainWorker
from sollold.models.model import Model
from sollold.models.own_models import Told
from sollold.serving.ask import Service


@dataclass(frozen=True, slots=True)
class Listed:
    """A model of the cluster, once, with the names of the nodes that hold it."""

    model: Model
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """A model that is loaded somewhere now."""

    endpoint: Endpoint
    node: str
    """Name of the node that answers for it."""


class Library(Protocol):
    """The models of the whole cluster."""

    async def models(self) -> tuple[Listed, ...]:
        """Every model once, by name."""
        ...

    async def find(self, name: str) -> Listed:
        """The model a caller means by ``name``.

        Raises:
            Refusal: NOT_FOUND, or AMBIGUOUS with the candidates.
        """
        ...

    async def metadata(self, listed: Listed) -> Mapping[str, Any]:
        """The GGUF header's key-value pairs, long arrays left out; empty when no node could be asked."""
        ...

    def running(self) -> tuple[Running, ...]:
        """What is loaded now, from the records."""
        ...

    async def copy(
        self, source: str, destination: str, nodes: Sequence[str] = (), told: Told | None = None
    ) -> None:
        """Give a model a second name on the ``nodes`` (names or ids); none named: on all that have it.
        ``told``: what is said of it under that name.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST when it can't be done, with what to do.
        """
        ...

    async def delete(self, name: str, nodes: Sequence[str] = ()) -> None:
        """Remove a model that was fetched by the daemon, or a second name; never the user's own files.

        ``nodes``: names or ids of where; none named: everywhere.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST for a model that is the user's own.
        """
        ...


class Puller(Protocol):
    """Fetches models into the daemon's own folder."""

    def pull(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """Progress as Ollama tells it: ``{status, digest?, total?, completed?}``, at the end ``success``.

        Leaving the iteration stops the fetch; asking again goes on with it.

        Raises:
            Refusal: NOT_FOUND, UNAVAILABLE …, at any point.
        """
        ...


class Relayed(Protocol):
    """An Ollama's answer under way, as it is."""

    status: int
    kind: str
    """Its content type."""

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body in pieces.

        Raises:
            Refusal: it broke off.
        """
        ...

    async def close(self) -> None:
        """End it, wherever it is."""
        ...


class Relay(Protocol):
    """Passes a request on to an Ollama of the cluster as it is: for push, create and blobs."""

    async def forward(
        self, method: str, path: str, body: AsyncIterator[bytes] | bytes, model: str = ""
    ) -> Relayed | None:
        """Its answer, to be closed; ``None`` when no node has an Ollama. ``model``: the one it must have.

        Raises:
            Refusal: UNAVAILABLE, it can't be reached.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlanAsk:
    """What ``/api/cluster/plan`` and ``/load`` are asked."""

    model: str
    context: int = 0
    slots: int = 0
    type_k: str = ""
    type_v: str = ""
    policy: str = ""
    layers: tuple[tuple[str, int], ...] = ()
    """(node's name or id, layers) that the caller fixed, in order, the output counted as one layer."""
    embedding: bool = False
    keep_alive: float | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What would go where. ``ok`` False: ``reason`` carries the arithmetic."""

    ok: bool
    reason: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    """JSON of the `Plan`, as `msgspec.to_builtins` gives it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One endpoint as the router sees it."""

    endpoint: str
    node: str
    score: float
    why: str


class Cluster(Protocol):
    """The cluster as a whole."""

    @property
    def me(self) -> Record:
        """This node's own record."""
        ...

    def live(self) -> tuple[Record, ...]:
        """The nodes that are alive, this one included."""
        ...

    def leader(self) -> Term:
        """Who plans at present."""
        ...

    async def plan(self, ask: PlanAsk) -> Planned:
        """What a load would do, without doing it.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, UNAVAILABLE.
        """
        ...

    async def load(self, ask: PlanAsk) -> tuple[Record, Endpoint]:
        """Load a model and wait until it can answer; (who answers for it, the endpoint).

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, TOO_BIG with the arithmetic, UNAVAILABLE, TIMEOUT.
        """
        ...

    async def unload(self, model: str, *, force: bool) -> int:
        """End what is loaded of ``model`` (a name or a deployment's id) and say how many were.

        Raises:
            Refusal: NOT_FOUND; UNAVAILABLE while requests are in it and not ``force``.
        """
        ...

    async def scan(self) -> tuple[PlainWorker, ...]:
        """Workers of llama.cpp that others started, as this node sees them on its LAN; takes some seconds."""
        ...

    async def drain(self, node: str, *, on: bool) -> None:
        """Take a node (id or name; empty: this one) out of new work, or back.

        Raises:
            Refusal: NOT_FOUND, UNAVAILABLE.
        """
        ...

    async def scores(self, model: str) -> tuple[Scored, ...]:
        """What the router would choose from for ``model`` now, the best first.

        Raises:
            Refusal: NOT_FOUND.
        """
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """All that the API is built from. ``puller`` and ``relay`` may be missing: their routes say so."""

    service: Service
    library: Library
    cluster: Cluster
    puller: Puller | None = None
    relay: Relay | None = None
    findings: Callable[[], list[Finding]] = list
    """What is wrong; it may block a moment."""
