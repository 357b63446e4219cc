"""The requests to models that this node is answering, for the dashboard and the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.http.exchange import exchange_of
from sollold.control.activity import (
    TOKEN_BUCKETS,
    Activity,
    FinishedRequest,
    generation_seconds,
    token_counts,
)
from sollold.errors import Refusal
from sollold.serving.request import Ask, Routing, Waiting

_BYTES_PER_TOKEN = 4
"""Bytes of a request's JSON for each token of its prompt, as Ollama assumes."""
_MAX_ERROR_CHARACTERS = 300
"""Maximum characters of an error that are kept."""


def estimated_tokens(body: dict[str, Any]) -> int:
    """Estimate the number of tokens of the prompt in a request's body."""
    return len(msgspec.json.encode(body)) // _BYTES_PER_TOKEN


class InflightRequest(msgspec.Struct):
    """A request being answered."""

    ask: Ask
    path: str
    activity: Activity
    started: float = msgspec.field(default_factory=time.monotonic)
    waiting: Waiting = Waiting("planning")
    """What its caller is waiting for."""
    events: int = 0
    """Number of events from the engine so far; in a stream, about one per token."""
    routing: Routing | None = None
    error: str = ""
    outcome: str = "ok"
    ended: bool = False
    """Everything was written to the connection: a caller that hangs up from now on has the whole answer."""
    first: float = 0.0
    last: float = 0.0
    tail: tuple[bytes, bytes] = (b"", b"")
    usages: list[tuple[int, int]] = msgspec.field(default_factory=list)
    """Tokens of the prompt and of the answer of each choice that has ended in a stream."""
    prompt_tokens: int = 0
    """Tokens of the prompt, if they are not in the engine's last events."""
    gaps: list[int] = msgspec.field(default_factory=lambda: [0] * (len(TOKEN_BUCKETS) + 1))

    def wait(self, waiting: Waiting) -> None:
        """Record what its caller is waiting for."""
        self.waiting = waiting

    def answers(self, routing: Routing) -> None:
        """Record that an engine answers, initially or after a fault."""
        self.waiting = Waiting("answering", node=routing.node)
        self.routing = routing

    def event(self, raw: bytes) -> None:
        """Record an event of a stream from the engine: about a token."""
        now = time.monotonic()
        self.activity.tokens += 1
        if self.events:
            self.gaps[bisect_left(TOKEN_BUCKETS, now - self.last)] += 1
        else:
            self.first = now
            self.activity.first(now - self.started)
        self.events += 1
        self.last = now
        self.tail = self.tail[1], raw
        if b'"usage"' in raw and (counts := token_counts(raw)) is not None:
            self.usages.append(counts)

    def whole(self, raw: bytes) -> None:
        """Record an answer in one piece. If text was generated, the first token came before it."""
        self.tail = b"", raw
        self.last = time.monotonic()
        seconds = generation_seconds(raw)
        if seconds is not None:
            self.first = max(self.started, self.last - seconds)
            self.activity.first(self.first - self.started)

    def failed(self, error: BaseException) -> None:
        """Record that it ends with an error, which is reported to the caller."""
        self.outcome = "error"
        self.error = error.message if isinstance(error, Refusal) else str(error) or type(error).__name__

    def cancelled(self) -> None:
        """Record that its caller hung up, unless everything was already sent."""
        if not self.ended:
            self.outcome = "cancelled"

    def shown(self) -> dict[str, Any]:
        """Return it as in the JSON of ``/api/cluster/requests``."""
        return {
            "id": self.ask.id,
            "model": self.ask.model,
            "path": self.path,
            "priority": self.ask.priority,
            "stage": self.waiting.stage,
            "node": self.waiting.node,
            "seconds": round(time.monotonic() - self.started, 1),
            "events": self.events,
        }

    def _counts(self) -> tuple[int, int]:
        """Return the number of tokens of the prompt and of the answer."""
        body = next((call.body for call in self.ask.calls.values()), {})
        asked = body.get("n")
        choices = asked if isinstance(asked, int) else 1
        if len(self.usages) > 1 and (choices > 1 or isinstance(body.get("prompt"), list)):
            # Each choice reports the prompt that it shares with the others.
            prompt, generated = map(sum, zip(*self.usages, strict=True))
            return prompt // max(1, min(choices, len(self.usages))), generated
        counts = token_counts(*self.tail)
        if counts is not None:
            return counts
        if self.events and self.ask.stream:
            # It ended early; an engine reports the counts with its last events.
            return estimated_tokens(body), self.events
        return self.prompt_tokens, 0

    def finished(self) -> FinishedRequest:
        """Return the record to keep of it."""
        prompt, generated = self._counts()
        routing, resolved = self.routing, self.ask.resolved
        name = resolved.model.name if resolved is not None else ""
        return FinishedRequest(
            id=self.ask.id,
            time=time.time(),
            path=self.path,
            model=routing.model if routing is not None else name or self.ask.model[:200],
            node=routing.node if routing is not None else "",
            backend=str(routing.backend) if routing is not None else "",
            outcome=self.outcome,
            error=self.error[:_MAX_ERROR_CHARACTERS],
            prompt_tokens=prompt,
            tokens=generated,
            first_token=self.first - self.started if self.first else -1.0,
            seconds=time.monotonic() - self.started,
            queue=routing.queue_ms / 1000 if routing is not None else 0.0,
            load=routing.load_ms / 1000 if routing is not None else 0.0,
            resumed=routing.resumed if routing is not None else 0,
            known=routing is not None or bool(name),
        )


class InflightRequests:
    """All requests being answered; at most as many as there are connections."""

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.activity.active = self.__len__
        self._all: dict[int, InflightRequest] = {}

    @contextlib.contextmanager
    def answering(self, request: web.Request, ask: Ask) -> Iterator[InflightRequest]:
        """List a request for the duration of the block. Then it is counted, for its log line as well."""
        entry = self.begin(ask, request.path)
        self._all[id(entry)] = entry
        try:
            yield entry
        except (asyncio.CancelledError, ConnectionError):
            entry.cancelled()
            raise
        except Exception as error:
            entry.failed(error)
            raise
        finally:
            del self._all[id(entry)]
            exchange_of(request).finished = self.count(entry)

    def begin(self, ask: Ask, path: str) -> InflightRequest:
        """Return a new request, which is not listed."""
        self.activity.on_begin()
        return InflightRequest(ask, path, self.activity)

    def count(self, entry: InflightRequest) -> FinishedRequest:
        """Count a request that has ended, in any way."""
        record = entry.finished()
        # The tokens of a stream were counted as they came, unless it came in one piece.
        if entry.events < 2:
            self.activity.tokens += max(0, record.tokens - entry.events)
        # Events without a token, such as a role, came together with others.
        entry.gaps[0] -= min(entry.gaps[0], max(0, entry.events - record.tokens))
        lost = entry.routing.gap_ms / 1000 if entry.routing is not None else 0.0
        self.activity.add_finished(record, entry.gaps, max(0.0, entry.last - entry.first), lost)
        return record

    def __len__(self) -> int:
        return len(self._all)

    def shown(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the oldest ``limit`` of them as JSON."""
        return [entry.shown() for entry in list(self._all.values())[:limit]]

    def recent(self) -> list[dict[str, Any]]:
        """Return those that ended last, newest first, for display."""
        return [_recent(record) for record in reversed(self.activity.recent)]


def _recent(record: FinishedRequest) -> dict[str, Any]:
    return {
        "id": record.id,
        "time": round(record.time, 3),
        "path": record.path,
        "model": record.model,
        "node": record.node,
        "backend": record.backend,
        "outcome": record.outcome,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.tokens,
        "first_token_seconds": round(record.first_token, 3) if record.first_token >= 0 else None,
        "seconds": round(record.seconds, 3),
        "queue_seconds": round(record.queue, 3),
        "load_seconds": round(record.load, 3),
        "tokens_per_second": _rate(record),
        "resumed": record.resumed,
    }


def _rate(record: FinishedRequest) -> float | None:
    """Return the tokens per second after the first one; None if that is not meaningful."""
    if record.first_token < 0 or record.tokens < 2 or record.seconds - record.first_token < 0.01:
        return None
    return round((record.tokens - 1) / (record.seconds - record.first_token), 1)
