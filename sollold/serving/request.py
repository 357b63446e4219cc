"""A caller's request and its answer, independent of the dialect: the interface between api and serving.

A dialect parses and validates, renders the request for each kind of engine (`Call`), and passes an `Ask`
to the service. It gets an `Answer`: where it comes from (`Routing`) and the engine's own events as raw
JSON, one ``bytes`` per event. For llama.cpp those are the payloads of its ``data:`` lines; for Ollama the
NDJSON lines (``/api/*``) or the payloads of its ``data:`` lines (``/v1/*``). ``[DONE]`` is never among
them. A request that is not streamed yields exactly one event, the whole body. If the dialect is the
engine's own, the bytes are forwarded unparsed; they are parsed only after a fault.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import field
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from sollold.cluster.gossip.record import Backend, Drafts
from sollold.cluster.net.pour import Pour, pulled
from sollold.facts import dataclass
from sollold.leader.wish import PlacementWish
from sollold.models.listing import Listed
from sollold.serving.media import Media


class Engine(StrEnum):
    """The kind of engine, which determines the format of the events."""

    LLAMA = "llama"
    OLLAMA = "ollama"


class Call(msgspec.Struct, frozen=True):
    """A request in an engine's own form: ``path`` on its HTTP API, and the JSON body.

    ``notes``: the parts of the caller's request that have no effect there, one sentence each.
    """

    path: str
    body: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delivered:
    """The part of a streamed answer that another node, now gone, delivered to the caller.

    Attributes:
        content, thinking: the text.
        events: number of events with text: about the number of tokens.
        tool_calls, logprobs: whether the events contained any.
        spent_ms: time that engines spent generating it, in milliseconds.
        engine: the kind of engine that generated it; None: unknown.
    """

    content: str = ""
    thinking: str = ""
    events: int = 0
    tool_calls: bool = False
    logprobs: bool = False
    spent_ms: float = 0.0
    engine: Engine | None = None


class Ask(msgspec.Struct, frozen=True):
    """A caller's request.

    Attributes:
        model: the model's name as the caller wrote it.
        resolved: the model with that name, if it has already been looked up; otherwise serving looks it up.
        calls: the request for each kind of engine that can answer it; a kind that is missing cannot.
        stream: whether the caller wants events as they arrive.
        gathered: the caller reads events but delivers none before the answer is complete, so that the answer
            may start over after a fault. An empty event then means: discard all events before it.
        load_only: only load the model (or unload it, with ``keep_alive`` 0).
        context: requested context in tokens (``num_ctx``); 0: not set.
        keep_alive: seconds; negative: forever; None: not set.
        priority: 1 to 10; ``client``: for fairness; ``id``: in logs and headers.
        embedding: the model must be served for embeddings.
        deadline: seconds from now within which the response must be complete; 0: none.
        prefix: digest of the conversation's beginning, for stickiness; empty: none.
        placement: the caller's wishes for the model's placement.
        explain: put the router's scores into the routing.
        delivered: the part of this answer that the caller already has; only the rest is generated.
        media: the content cut out of the bodies of ``calls``; None: nothing.
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
    placement: PlacementWish = msgspec.field(default_factory=PlacementWish)
    delivered: Delivered | None = None
    media: Media | None = None


class Routing(msgspec.Struct):
    """Where an answer comes from; updated while the answer streams. Shown as ``_routing``."""

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
    """(endpoint, score, reason) of each candidate, if requested."""
    warnings: tuple[str, ...] = ()
    """Parts of the request that were changed or ignored, one sentence each."""
    drafts: Drafts = msgspec.field(default_factory=Drafts)
    """Speculation of the answering deployment when the request was sent to it."""

    def move(self, other: Routing) -> None:
        """Note that the answer continues from where ``other`` says; what was counted so far stays."""
        self.backend, self.engine, self.node = other.backend, other.engine, other.node
        self.coordinator_url, self.devices, self.drafts = other.coordinator_url, other.devices, other.drafts


class Waiting(msgspec.Struct, frozen=True):
    """What a caller is currently waiting for; shown in headers and messages."""

    stage: str
    """``planning``, ``loading``, ``queued``, ``answering`` (an engine has the request), ``recovering``."""
    progress: float = 0.0
    position: int = 0
    message: str = ""
    node: str = ""
    """Name of the node whose engine has the request; empty if none has it."""


async def _no_close() -> None:
    """The ``close`` of an answer that holds no resources."""


@dataclass(slots=True)
class Answer:
    """An answer in progress. Read it to its end with ``pour``, `batches`, `events` or `whole`, or `end` it.

    ``pour`` passes events to a receiver as soon as they arrive, in lists of those that arrived together, so
    that they can be forwarded together. All of these may raise `Refusal` (INTERRUPTED, TIMEOUT, ENGINE) at
    any point.
    """

    routing: Routing
    pour: Pour[list[bytes]]
    close: Callable[[], Coroutine[Any, Any, None]] = field(default=_no_close)
    """Ends the generation and frees its slot."""
    over: Callable[[], bool] = field(default=lambda: False)
    """Whether ``close`` has nothing left to do."""
    _batches: AsyncIterator[list[bytes]] | None = field(default=None, init=False)
    _events: AsyncIterator[bytes] | None = field(default=None, init=False)

    @property
    def batches(self) -> AsyncIterator[list[bytes]]:
        """An iterator over the same lists, always the same one; when it finishes it `end`s the answer."""
        if self._batches is None:
            self._batches = self._read_batches()
        return self._batches

    @property
    def events(self) -> AsyncIterator[bytes]:
        """An iterator over single events, for callers to whom speed does not matter."""
        if self._events is None:
            self._events = _single_events(self.batches)
        return self._events

    async def _read_batches(self) -> AsyncIterator[list[bytes]]:
        try:
            async for batch in pulled(self.pour):
                yield batch
        finally:
            await self.end()

    async def end(self) -> None:
        """Call ``close`` unless all is closed; it completes even if this call is cancelled."""
        if not self.over():
            await asyncio.shield(asyncio.ensure_future(self.close()))

    async def whole(self) -> bytes:
        """Return all events concatenated: the body of an answer that is not streamed."""
        parts: list[bytes] = []

        def receive(batch: list[bytes]) -> bool:
            parts.extend(batch)
            return True

        while not await self.pour(receive):
            pass
        return b"".join(parts)


async def _single_events(batches: AsyncIterator[list[bytes]]) -> AsyncIterator[bytes]:
    async for batch in batches:
        for event in batch:
            yield event


class Service(Protocol):
    """The interface that the dialects call."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """Find or load an endpoint, wait for a slot, send the request.

        Returns when the engine has begun to respond (its status is known). Cancelling it leaves the queue.

        Raises:
            Refusal: as its ``fault`` says.
        """
        ...


_LIMIT = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx(?:_seq)?\D{1,4}(\d+)")


_WORDS = ("too l", "exceed", "larger than")


def longest_input(message: str) -> int | None:
    """Return the engine's limit in tokens if ``message`` refuses an input as too long, else ``None``."""
    if not any(word in message for word in _WORDS):
        return None
    match = _LIMIT.search(message)
    if match is None:
        return None
    return int(next(group for group in match.groups() if group))
