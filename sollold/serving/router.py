"""Chooses the endpoint for a request. Pure: records in, a ranked list with reasons out; no network hop.

The router itself remembers this node's running requests, the recent performance of endpoints, and which one
had the beginning of a conversation (its KV cache may still hold it). All of this is bounded.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import field

from sollold.bounded import BoundedDict
from sollold.cluster.gossip.record import Endpoint, Record
from sollold.facts import dataclass
from sollold.serving.candidate import (
    EndpointCandidate,
    EndpointQuery,
    ScoredCandidate,
    engine_of,
    fits,
    has_room,
    on_gpu,
)
from sollold.serving.ranking import RULES, STRATEGIES

_MAX_PREFIXES = 4096
_PREFIX_SECONDS = 600.0
_LEARNING_RATE = 0.3
_RECORD_AGE = 1.5
"""Maximum expected age of a record, in seconds."""


class Breaker:
    """A circuit breaker: blocks requests to an unreachable endpoint, and periodically lets one through.

    Closed → open after ``threshold`` consecutive errors → one try after the pause → closed or open again.
    """

    def __init__(self, threshold: int = 3, pause: float = 2.0, longest: float = 15.0) -> None:
        """``pause``: seconds of the first opening; each further one doubles it, up to ``longest``."""
        self._threshold = threshold
        self._pause = pause
        self._max_pause = longest
        self._errors = 0
        self._openings = 0
        self._until = 0.0
        self._trying = False

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now; while half open, only one at a time."""
        if self._openings == 0:
            return True
        return now >= self._until and not self._trying

    def sent(self, now: float) -> None:
        """Note that a request is being sent."""
        if self._openings and now >= self._until:
            self._trying = True

    def reached(self) -> None:
        """Note that the endpoint responded, with whatever result."""
        self._errors = self._openings = 0
        self._trying = False

    def given_up(self) -> None:
        """Note that the request was cancelled before it showed anything about the endpoint."""
        self._trying = False

    def failed(self, now: float) -> None:
        """Note that the endpoint could not be reached, or that the connection broke."""
        self._errors += 1
        if self._trying or self._errors >= self._threshold:
            self._until = now + min(self._pause * 2**self._openings, self._max_pause)
            self._openings = min(self._openings + 1, 16)
            self._errors = 0
        self._trying = False


@dataclass(slots=True)
class _Memory:
    """The router's state for one endpoint."""

    under_way: int = 0
    last_sent: int = 0
    """Sequence number of the request last sent there."""
    peak: tuple[float, int, int] = (0.0, 0, 0)
    """Start of the current time span, maximum `under_way` in it, and maximum in the span before."""
    first_byte: float = 0.0
    success: float = 1.0
    breaker: Breaker = field(default_factory=Breaker)


class Router:
    """Chooses endpoints for the requests of one node."""

    def __init__(self, me: str, strategy: str = "intelligent") -> None:
        """``me``: this node's id; ``strategy``: a key of `STRATEGIES`.

        Raises:
            KeyError: there is no such strategy.
        """
        self._me = me
        weights = STRATEGIES[strategy]
        self._rules = tuple((rule, weights[rule.name]) for rule in RULES if weights.get(rule.name))
        self._memory: defaultdict[tuple[str, str], _Memory] = defaultdict(_Memory)
        self._prefixes: BoundedDict[str, tuple[tuple[str, str], float]] = BoundedDict(_MAX_PREFIXES)
        self._sequence = 0
        self.on_request_end: Callable[[tuple[str, str]], None] = lambda endpoint: None
        """Called with the endpoint whenever a request there has ended."""

    def candidates(
        self, records: Iterable[Record], query: EndpointQuery, now: float
    ) -> tuple[EndpointCandidate, ...]:
        """Endpoints that could answer ``query`` now, without those behind an open breaker."""
        sticky, used = self._prefixes.get(query.prefix, (("", ""), 0.0))
        recent = now - used < _PREFIX_SECONDS
        candidates = []
        for record in records:
            if record.draining:
                continue
            for endpoint in record.endpoints:
                key = (record.node, endpoint.id)
                assigned = key == query.assigned
                if not fits(endpoint, query, assigned=assigned) or not (
                    assigned or has_room(record, endpoint, query)
                ):
                    continue
                memory = self._memory.get(key) or _Memory()
                if not memory.breaker.allows(now):
                    continue
                candidates.append(
                    EndpointCandidate(
                        key,
                        engine_of(endpoint),
                        record,
                        endpoint,
                        local=record.node == self._me,
                        gpu=on_gpu(record, endpoint),
                        load=_load(endpoint, memory, now),
                        speed=endpoint.speed,
                        first_byte=memory.first_byte,
                        success=memory.success,
                        sticky=recent and sticky == key,
                    )
                )
        return tuple(candidates)

    def rank(
        self,
        records: Iterable[Record],
        query: EndpointQuery,
        now: float,
        without: Set[tuple[str, str]] = frozenset(),
        *,
        score_sole: bool = True,
    ) -> tuple[ScoredCandidate, ...]:
        """The candidates, best first, except those in ``without`` (just tried without success).

        ``score_sole``: compute the score of a sole candidate too, for display.
        """
        candidates = self.candidates(records, query, now)
        if without:
            candidates = tuple(c for c in candidates if c.key not in without)
        if not self._rules:
            ordered = sorted(candidates, key=lambda c: (self._last_sent(c.key), c.key))
            return tuple(ScoredCandidate(c, 0.0) for c in ordered)
        if len(candidates) == 1 and not score_sole:
            return (ScoredCandidate(candidates[0], 0.0),)
        choices = [self._score(candidate, query, candidates) for candidate in candidates]
        if len(choices) > 1:
            self._sort(choices)
        return tuple(choices)

    def _sort(self, choices: list[ScoredCandidate]) -> None:
        # Break ties by a checksum, so that nodes with the same records do not all choose the same endpoint.
        choices.sort(key=lambda c: (-c.score, zlib.crc32(f"{self._me}{c.candidate.key}".encode())))

    def _score(
        self, candidate: EndpointCandidate, query: EndpointQuery, candidates: tuple[EndpointCandidate, ...]
    ) -> ScoredCandidate:
        marks = tuple(
            (rule.words, rule.mark(candidate, query, candidates), weight) for rule, weight in self._rules
        )
        return ScoredCandidate(candidate, round(sum(mark * weight for _, mark, weight in marks), 3), marks)

    def better(
        self, records: Iterable[Record], query: EndpointQuery, now: float, current: tuple[str, str]
    ) -> EndpointCandidate | None:
        """Return another endpoint that is free now, for a request that waits in the queue of ``current``."""
        free = [
            choice.candidate
            for choice in self.rank(records, query, now, frozenset((current,)))
            if choice.candidate.free and choice.candidate.endpoint.loaded
        ]
        return free[0] if free else None

    # Events of requests.

    def sent(self, key: tuple[str, str], query: EndpointQuery, now: float) -> None:
        """Note that a request is being sent to the endpoint ``key``."""
        memory = self._memory[key]
        memory.under_way += 1
        self._sequence += 1
        memory.last_sent = self._sequence
        _recent_peak(memory, now)
        memory.breaker.sent(now)
        if query.prefix:
            self._prefixes[query.prefix] = (key, now)

    def began(self, key: tuple[str, str], seconds: float) -> None:
        """Note that the engine began to respond after ``seconds``."""
        memory = self._memory[key]
        memory.breaker.reached()
        memory.first_byte += (seconds - memory.first_byte) * (_LEARNING_RATE if memory.first_byte else 1.0)

    def ended(self, key: tuple[str, str], ok: bool | None) -> None:
        """Note that a request ended; ``ok`` None: it showed nothing about the endpoint (cancelled, say)."""
        memory = self._memory.get(key)
        if memory is None:
            return
        memory.under_way = max(0, memory.under_way - 1)
        self.on_request_end(key)
        if ok is None:
            memory.breaker.given_up()
        else:
            memory.success += _LEARNING_RATE * ((1.0 if ok else 0.0) - memory.success)

    def failed(self, key: tuple[str, str], now: float) -> None:
        """Note a transport error: the endpoint could not be reached, or the connection broke."""
        self._memory[key].breaker.failed(now)

    def forget(self, records: Iterable[Record]) -> None:
        """Drop the state of endpoints that are no longer in the records and have no running requests."""
        known = {(record.node, endpoint.id) for record in records for endpoint in record.endpoints}
        for key in [key for key, memory in self._memory.items() if key not in known and not memory.under_way]:
            del self._memory[key]

    def _last_sent(self, key: tuple[str, str]) -> int:
        """Sequence number of the endpoint's last request; 0 if it had none."""
        memory = self._memory.get(key)
        return memory.last_sent if memory is not None else 0


def _load(endpoint: Endpoint, memory: _Memory, now: float) -> int:
    """The exact number of this node's running requests, plus those in the record beyond this node's own."""
    others = endpoint.active + endpoint.waiting - _recent_peak(memory, now)
    return memory.under_way + max(0, others)


def _recent_peak(memory: _Memory, now: float) -> int:
    """Maximum of this node's running requests during the period that a record may reflect."""
    start, peak, previous = memory.peak
    if now - start > 2 * _RECORD_AGE:
        start, peak, previous = now, memory.under_way, memory.under_way
    elif now - start > _RECORD_AGE:
        start, peak, previous = now, memory.under_way, peak
    peak = max(peak, memory.under_way)
    memory.peak = (start, peak, previous)
    return max(peak, previous)
