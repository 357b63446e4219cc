"""Statistics of requests through this node: counters, histograms, and the last hundred requests. Pure."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import field

import msgspec

from sollold.facts import dataclass

MOST_RECENT = 100
MOST_LABELS = 500
"""Maximum number of (route, model) pairs with their own statistics; later ones count as model ``other``."""

FIRST_TOKEN_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 320)
TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 10)
WAIT_BUCKETS = (0.1, 0.5, 1, 5, 10, 30, 120, 600)
REQUEST_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Histogram:
    """Counts values by bucket, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add values that were counted elsewhere with the same bounds."""
        if any(counts):
            for place, count in enumerate(counts):
                self.counts[place] += count
            self.sum += total

    def cumulative(self) -> list[tuple[str, int]]:
        """Return (upper bound, count of values up to it) pairs, the last with ``+Inf``, as in Prometheus."""
        found, total = [], 0
        for bound, count in zip((*(f"{bound:g}" for bound in self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


@dataclass(slots=True)
class RequestStats:
    """Statistics of all requests with the same route and model. Times in seconds."""

    outcomes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    inter_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    queue: Histogram = field(default_factory=lambda: Histogram(WAIT_BUCKETS))
    load: Histogram = field(default_factory=lambda: Histogram(WAIT_BUCKETS))
    duration: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))


class FinishedRequest(msgspec.Struct, frozen=True):
    """A finished request.

    Attributes:
        time: when it ended, in seconds since the epoch.
        model: the model's name in the cluster, else as requested; ``node``: the node that served it.
        known: whether the cluster has the model.
        outcome: ``ok``, ``error`` or ``cancelled``; ``error``: the message to the caller.
        first_token: seconds until the first event; negative when there was none.
        seconds: total duration; ``queue``, ``load``: seconds of it spent queued and loading.
        resumed: number of times it was resumed after a fault.
    """

    id: str
    time: float
    path: str
    model: str
    node: str
    backend: str
    outcome: str
    error: str
    prompt_tokens: int
    tokens: int
    first_token: float
    seconds: float
    queue: float
    load: float
    resumed: int
    known: bool = True


class Activity:
    """Counts all model requests through this node since its start."""

    def __init__(self) -> None:
        self.tokens = 0
        """Number of events of all responses so far, about one per token; used for rates."""
        self.prompt_tokens = 0
        self.finished = 0
        self.failed = 0
        self.first_token_sum = 0.0
        self.first_token_count = 0
        self.resumed = 0
        self.active: Callable[[], int] = lambda: 0
        """Returns the number of requests under way."""
        self.on_begin: Callable[[], None] = lambda: None
        """Called when a request begins, before any of it is counted."""
        self.on_resumed: Callable[[FinishedRequest], None] = lambda _: None
        self.gap = Histogram(WAIT_BUCKETS)
        """Seconds without a token while a response was being resumed."""
        self.stats: dict[tuple[str, str], RequestStats] = {}
        self.recent: deque[FinishedRequest] = deque(maxlen=MOST_RECENT)

    def first(self, seconds: float) -> None:
        """Count the first event of a response, ``seconds`` after its request."""
        self.first_token_sum += seconds
        self.first_token_count += 1

    def add_finished(
        self, done: FinishedRequest, gaps: Sequence[int] = (), gap_sum: float = 0.0, lost: float = 0.0
    ) -> None:
        """Count a finished request.

        ``gaps``, ``gap_sum``: times between its tokens, counted by `TOKEN_BUCKETS`; ``lost``: seconds during
        which it was being resumed.
        """
        self.finished += 1
        self.failed += done.outcome == "error"
        self.prompt_tokens += done.prompt_tokens
        self.recent.append(done)
        stats = self._of(done.path, done.model if done.known else "")
        stats.outcomes[done.outcome] = stats.outcomes.get(done.outcome, 0) + 1
        stats.prompt_tokens += done.prompt_tokens
        stats.generated_tokens += done.tokens
        stats.duration.observe(done.seconds)
        if done.node:
            stats.queue.observe(done.queue)
            stats.load.observe(done.load)
        if done.first_token >= 0:
            stats.first_token.observe(done.first_token)
            stats.inter_token.add(gaps, gap_sum)
        if done.resumed:
            self.resumed += done.resumed
            self.gap.observe(lost)
            self.on_resumed(done)

    def _of(self, route: str, model: str) -> RequestStats:
        key = route, model
        if key not in self.stats and len(self.stats) >= MOST_LABELS:
            key = route, "other"
        stats = self.stats.get(key)
        if stats is None:
            stats = self.stats[key] = RequestStats()
        return stats


_NUMBER = re.compile(rb"\s*(\d{1,18}(?:\.\d{1,9})?)")
_TAIL_BYTES = 4096
"""Bytes at the end of a response that contain its token counts."""


def token_counts(*events: bytes) -> tuple[int, int] | None:
    """Return (prompt tokens, generated tokens) from the last events of an engine's response, or None.

    Text inside a JSON string has its quotation marks escaped, so it is not mistaken for the counts.
    """
    # Slice before joining, so as not to copy a long response.
    tail = b"\n".join([event[-_TAIL_BYTES:] for event in events])[-_TAIL_BYTES:]
    generated = _last(tail, "predicted_n", "completion_tokens", "eval_count")
    prompt = _last(tail, "prompt_tokens", "prompt_eval_count")
    if prompt is None and (read := _last(tail, "prompt_n")) is not None:
        prompt = read + (_last(tail, "cache_n") or 0)
    if generated is None and prompt is None:
        return None
    return int(prompt or 0), int(generated or 0)


def generation_seconds(answer: bytes) -> float | None:
    """Return how long an engine generated the text of a whole answer; None if the answer does not say it."""
    tail = answer[-_TAIL_BYTES:]
    if (milliseconds := _last(tail, "predicted_ms")) is not None:
        return milliseconds / 1e3
    nanoseconds = _last(tail, "eval_duration")
    return nanoseconds / 1e9 if nanoseconds is not None else None


def _last(tail: bytes, *names: str) -> float | None:
    """Return the last number in ``tail`` that has the first of ``names`` with one."""
    for name in names:
        key = f'"{name}":'.encode()
        start = tail.rfind(key)
        if start >= 0 and (number := _NUMBER.match(tail, start + len(key))):
            return float(number[1])
    return None
