"""A caller's request without its dialect, and its answer: the interface between api and serving.

A dialect parses and validates, renders the request for each kind of engine (`Call`), and hands an `Ask`
to the service. It gets an `Answer`: a status of things (`Routing`) and the engine's own events as raw
JSON, one ``bytes`` an event. For llama.cpp those are the payloads of its ``data:`` lines; for Ollama the
NDJSON lines (``/api/*``) or the payloads of its ``data:`` lines (``/v1/*``). ``[DONE]`` is never among
them. A request not streamed yields exactly one event, the whole body. So a dialect that speaks as the
engine does passes bytes on unread, and only a fault makes anybody parse them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import field
from enum import StrEnum
from typing import Any, Protocol

from sollold.cluster.gossip.record import Backend, Drafts
from sollold.cluster.net.pour import Pour, pulled
from sollold.facts import dataclass
from sollold.leader.wish import PlacementWish
from sollold.models.listing import Listed
from sollold.serving.media import Media


class Engine(StrEnum):
    """Who computes: decides the form of the events."""

    LLAMA = "llama"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True)
class Call:
    """A request as an engine wants it: ``path`` on its own HTTP API, and the JSON body.

    ``notes``: what of the caller's request has no effect there, a sentence each.
    """

    path: str
    body: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delivered:
    """What another node, which is gone, gave its caller of a streamed answer.

    Attributes:
        content, thinking: the text.
        events: pieces in which it came: about as many as tokens.
        tool_calls, logprobs: whether any were among them.
        spent_ms: milliseconds for which engines made it.
        engine: the kind that did; None: not known.
    """

    content: str = ""
    thinking: str = ""
    events: int = 0
    tool_calls: bool = False
    logprobs: bool = False
    spent_ms: float = 0.0
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A caller's request.

    Attributes:
        model: as the caller wrote it.
        resolved: the model that the name means, when it has been looked up already; else it is looked up.
        calls: the request for each engine that could answer it. An engine that is missing can't.
        stream: whether the caller wants events as they come.
        gathered: events are wanted, and none of them reaches anybody before the answer is whole: after a
            fault it may begin anew. Then an empty event says that those before it are to be forgotten.
        load_only: load (or unload, with ``keep_alive`` 0) and answer nothing.
        context: tokens asked for (``num_ctx``); 0: not named.
        keep_alive: seconds; negative: for ever; None: not named.
        priority: 1 to 10; ``client``: for fairness; ``id``: in logs and headers.
        embedding: the model must be served for embeddings.
        deadline: seconds from now in which the response must be complete; 0: none.
        prefix: digest of the conversation's beginning, for stickiness; empty: none.
        placement: how the model is to be placed.
        explain: put the router's scores into the routing.
        delivered: what the caller has got of this answer already; only the rest is given.
        media: what was cut out of the bodies of the calls; None: nothing.
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
    resolved: Listed | None = None
    placement: PlacementWish = field(default_factory=PlacementWish)
    delivered: Delivered | None = None
    media: Media | None = None


@dataclass(slots=True)
class Routing:
    """Where an answer came from; filled while it is being given. Shown as ``_routing``."""

    backend: Backend
    engine: Engine
    model: str
    node: str
    coordinator_url: str
    devices: tuple[str, ...] = ()
    load_ms: float = 0.0
    queue_ms: float = 0.0
    resumed: int = 0
    gap_ms: float = 0.0
    scores: tuple[tuple[str, float, str], ...] = ()
    """(endpoint, score, why), when asked for."""
    warnings: tuple[str, ...] = ()
    """What was changed or left out of the request, a sentence each."""
    drafts: Drafts = field(default_factory=Drafts)
    """Speculation of the deployment, as it was when the request came."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a caller is waiting for, as it changes: shown in headers and messages."""

    stage: str
    """``planning``, ``loading``, ``queued``, ``answering`` (an engine has the request), ``recovering``."""
    progress: float = 0.0
    position: int = 0
    message: str = ""
    node: str = ""
    """The name of the node whose engine has the request; empty: none has it."""


async def _nothing() -> None:
    """For an answer that holds nothing."""


@dataclass(slots=True)
class Answer:
    """An answer under way. Take it to its end by ``pour``, `batches`, `events` or `whole`, or `end` it.

    ``pour`` hands the events to a receiver in the moment in which they come, those that came together in one
    list, so that they can leave together. Each way may raise `Refusal` (INTERRUPTED, TIMEOUT, ENGINE) at any
    point.
    """

    routing: Routing
    pour: Pour[list[bytes]]
    close: Callable[[], Coroutine[Any, Any, None]] = field(default=_nothing)
    """Ends the generation and frees its slot."""
    over: Callable[[], bool] = field(default=lambda: False)
    """Whether ``close`` has nothing to do any more."""
    _batches: AsyncIterator[list[bytes]] | None = field(default=None, init=False)
    _events: AsyncIterator[bytes] | None = field(default=None, init=False)

    @property
    def batches(self) -> AsyncIterator[list[bytes]]:
        """The same lists, for whoever fetches them. Always the same iterator, which `end`s the answer."""
        if self._batches is None:
            self._batches = self._fetched()
        return self._batches

    @property
    def events(self) -> AsyncIterator[bytes]:
        """The events one by one, likewise, for those to whom speed is nothing."""
        if self._events is None:
            self._events = _one_by_one(self.batches)
        return self._events

    async def _fetched(self) -> AsyncIterator[list[bytes]]:
        try:
            async for batch in pulled(self.pour):
                yield batch
        finally:
            await self.end()

    async def end(self) -> None:
        """``close`` it; completes even when it is cancelled meanwhile."""
        if not self.over():
            await asyncio.shield(asyncio.ensure_future(self.close()))

    async def whole(self) -> bytes:
        """All events together: the body of an answer that is not streamed."""
        parts: list[bytes] = []

        def receive(batch: list[bytes]) -> bool:
            parts.extend(batch)
            return True

        while not await self.pour(receive):
            pass
        return b"".join(parts)


async def _one_by_one(batches: AsyncIterator[list[bytes]]) -> AsyncIterator[bytes]:
    async for batch in batches:
        for event in batch:
            yield event


class Service(Protocol):
    """What the dialects call."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """Find or load an endpoint, wait for a slot, send the request.

        Returns when the engine has begun to answer (its status is known). Cancelling it leaves the queue.

        Raises:
            Refusal: as its ``fault`` says.
        """
        ...


_LIMIT = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx(?:_seq)?\D{1,4}(\d+)")


_WORDS = ("too l", "exceed", "larger than")


def longest_input(message: str) -> int | None:
    """Tokens that the engine would have taken, when ``message`` refuses a text as too long; else ``None``."""
    if not any(word in message for word in _WORDS):
        return None
    match = _LIMIT.search(message)
    if match is None:
        return None
    return int(next(group for group in match.groups() if group))
