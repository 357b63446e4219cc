"""What a caller asks, freed of its dialect, and what it gets back: the seam between api and serving.

A dialect parses and validates, renders the request for each kind of engine (`Call`), and hands an `Ask`
to the service. It gets an `Answer`: a status of things (`Routing`) and the engine's own events as raw
JSON, one ``bytes`` an event. For llama.cpp those are the payloads of its ``data:`` lines; for Ollama the
NDJSON lines (``/api/*``) or the payloads of its ``data:`` lines (``/v1/*``). ``[DONE]`` is never among
them. A request not streamed yields exactly one event, the whole body. So a dialect that speaks as the
engine does passes bytes on unread, and only a fault makes anybody parse them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from sollold.cluster.record import Backend
from sollold.models.names import Resolved

_BACK_AGAIN = 5.0
"""Seconds after which a caller may ask again for what is on a node that is away."""


class Engine(StrEnum):
    """Who computes: decides the form of the events."""

    LLAMA = "llama"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True)
class Call:
    """A request as an engine wants it: ``path`` on its own HTTP API, and the JSON body."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A caller's request.

    Attributes:
        model: as the caller wrote it.
        calls: the request for each engine that could answer it. An engine that is missing can't.
        stream: whether the caller wants events as they come.
        gathered: events are wanted, and none of them reaches anybody before the answer is whole: after a
            fault it may begin anew. Then an empty event says that those before it are to be forgotten.
        load_only: load (or unload, with ``keep_alive`` 0) and answer nothing.
        context: tokens asked for (``num_ctx``); 0: not named.
        keep_alive: seconds; negative: for ever; None: not named.
        priority: 1 to 10; ``client``: for fairness; ``id``: in logs and headers.
        embedding: the model must be served for embeddings.
        deadline: seconds from now in which the answer must be whole; 0: none.
        prefix: digest of the conversation's beginning, for stickiness; empty: none.
        explain: put the router's scores into the routing.
    """

    id: str
    model: str
    calls: dict[Engine, Call]
    stream: bool
    load_only: bool = False
    context: int = 0
    keep_alive: float | None = None
    priority: int = 5
    client: str = ""
    embedding: bool = False
    deadline: float = 0.0
    prefix: str = ""
    explain: bool = False
    gathered: bool = False


@dataclass(slots=True)
class Routing:
    """Where an answer came from; filled while it is being given. Shown as ``_routing``."""

    backend: Backend
    engine: Engine
    model: str
    node: str
    coordinator_url: str
    devices: tuple[str, ...] = ()
    duration_ms: float = 0.0
    load_ms: float = 0.0
    queue_ms: float = 0.0
    resumed: int = 0
    gap_ms: float = 0.0
    scores: tuple[tuple[str, float, str], ...] = ()
    """(endpoint, score, why), when asked for."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a caller is waiting for, as it changes: shown in headers and messages."""

    stage: str
    """``planning``, ``loading``, ``queued``, ``recovering``."""
    progress: float = 0.0
    position: int = 0
    message: str = ""


class Fault(StrEnum):
    """Kinds of refusal; each dialect has its own status, type and shape for them."""

    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    TOO_BIG = "too_big"
    """The model does not fit; the message carries the arithmetic."""
    UNAVAILABLE = "unavailable"
    """For now: queue full, load takes longer than the limit. With ``retry_after``."""
    TIMEOUT = "timeout"
    ENGINE = "engine"
    """The engine refused or failed; ``status`` is its own."""
    INTERRUPTED = "interrupted"
    """A fault mid-stream that can't be mended faithfully."""


class Refusal(Exception):
    """A request that can't be answered. The message says what happened, why, and what to do."""

    def __init__(self, fault: Fault, message: str, *, retry_after: float = 0.0, status: int = 0) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.retry_after = retry_after
        self.status = status


def unresolved(resolved: Resolved) -> Refusal:
    """Why a caller's name is not one model."""
    if resolved.candidates:
        return Refusal(Fault.AMBIGUOUS, resolved.message)
    if resolved.away:
        return Refusal(Fault.UNAVAILABLE, resolved.message, retry_after=_BACK_AGAIN)
    return Refusal(Fault.NOT_FOUND, resolved.message)


@dataclass(slots=True)
class Answer:
    """An answer under way. Iterate ``events`` to its end or call ``close``.

    ``events`` may raise `Refusal` (INTERRUPTED, TIMEOUT, ENGINE) at any point.
    """

    routing: Routing
    events: AsyncIterator[bytes]
    close: Callable[[], Any] = field(default=lambda: None)
    """Coroutine function or plain: ends the generation and frees its place."""


class Service(Protocol):
    """What the dialects call."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """Find or load an endpoint, wait for a turn, send the request.

        Returns when the engine has begun to answer (its status is known). Cancelling it leaves the line.

        Raises:
            Refusal: as its ``fault`` says.
        """
        ...
