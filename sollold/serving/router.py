"""Which endpoint answers. Pure: records in, a ranked list with reasons out; no network hop to decide.

What the router remembers of its own: requests it has under way, how endpoints did of late, which one had
the beginning of a conversation (its KV cache may still hold it). All of it bounded.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import field

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

_PREFIXES = 4096
_PREFIX_LIFE = 600.0
_LEARN = 0.3
_RECORD_AGE = 1.5
"""Seconds that a record may be old when it is looked at."""


class Breaker:
    """Keeps requests away from an endpoint that can't be reached, and tries it again now and then.

    Closed → open after ``threshold`` errors in a row → one try after the pause → closed or open again.
    """

    def __init__(self, threshold: int = 3, pause: float = 2.0, longest: float = 15.0) -> None:
        """``pause``: seconds of the first opening; doubled by each further one up to ``longest``."""
        self._threshold = threshold
        self._pause = pause
        self._longest = longest
        self._errors = 0
        self._openings = 0
        self._until = 0.0
        self._trying = False

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now; while half open only one at a time."""
        if self._openings == 0:
            return True
        return now >= self._until and not self._trying

    def sent(self, now: float) -> None:
        """A request is being sent."""
        if self._openings and now >= self._until:
            self._trying = True

    def reached(self) -> None:
        """The endpoint answered, whatever it said."""
        self._errors = self._openings = 0
        self._trying = False

    def given_up(self) -> None:
        """The request was called off before anything was learned."""
        self._trying = False

    def failed(self, now: float) -> None:
        """The endpoint could not be reached, or the connection broke."""
        self._errors += 1
        if self._trying or self._errors >= self._threshold:
            self._until = now + min(self._pause * 2**self._openings, self._longest)
            self._openings = min(self._openings + 1, 16)
            self._errors = 0
        self._trying = False


@dataclass(slots=True)
class _Memory:
    """What the router remembers of one endpoint."""

    under_way: int = 0
    last_sent: int = 0
    """When a request was last sent there, counted in requests."""
    peak: tuple[float, int, int] = (0.0, 0, 0)
    """Since when, the most under way since then, and the most in the span before."""
    first_byte: float = 0.0
    success: float = 1.0
    breaker: Breaker = field(default_factory=Breaker)


class Router:
    """One node's choice of endpoints."""

    def __init__(self, me: str, strategy: str = "intelligent") -> None:
        """``me``: this node's id; ``strategy``: a key of `STRATEGIES`.

        Raises:
            KeyError: there is no such strategy.
        """
        self._me = me
        weights = STRATEGIES[strategy]
        self._rules = tuple((rule, weights[rule.name]) for rule in RULES if weights.get(rule.name))
        self._memory: dict[tuple[str, str], _Memory] = {}
        self._prefixes: OrderedDict[str, tuple[tuple[str, str], float]] = OrderedDict()
        self._round = 0
        self.on_request_end: Callable[[tuple[str, str]], None] = lambda endpoint: None
        """Called with the endpoint whenever a request there is over."""

    def candidates(
        self, records: Iterable[Record], query: EndpointQuery, now: float
    ) -> tuple[EndpointCandidate, ...]:
        """Endpoints that could answer ``query`` now; those behind an open breaker are left out."""
        sticky = self._sticky_to(query.prefix, now)
        found = []
        for record in records:
            if record.draining:
                continue
            for endpoint in record.endpoints:
                key = (record.node, endpoint.id)
                told = key == query.told
                if not fits(endpoint, query, told=told) or not (told or has_room(record, endpoint, query)):
                    continue
                memory = self._memory.get(key) or _Memory()
                if not memory.breaker.allows(now):
                    continue
                found.append(
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
                        sticky=sticky == key,
                    )
                )
        return tuple(found)

    def rank(
        self,
        records: Iterable[Record],
        query: EndpointQuery,
        now: float,
        without: frozenset[tuple[str, str]] = frozenset(),
        *,
        score_sole: bool = True,
    ) -> tuple[ScoredCandidate, ...]:
        """The candidates, the best first; ``without`` those just tried in vain.

        ``score_sole``: also one that has no rival is given its score, which somebody wants to see.
        """
        others = tuple(c for c in self.candidates(records, query, now) if c.key not in without)
        if not self._rules:
            ordered = sorted(others, key=lambda c: (self._last_sent(c.key), c.key))
            return tuple(ScoredCandidate(c, 0.0) for c in ordered)
        if len(others) == 1 and not score_sole:
            return (ScoredCandidate(others[0], 0.0),)
        choices = [self._score(candidate, query, others) for candidate in others]
        if len(choices) > 1:
            self._sort(choices)
        return tuple(choices)

    def _sort(self, choices: list[ScoredCandidate]) -> None:
        # Ties go by a digest, so that nodes that know the same do not all choose the same endpoint.
        choices.sort(key=lambda c: (-c.score, zlib.crc32(f"{self._me}{c.candidate.key}".encode())))

    def _score(
        self, candidate: EndpointCandidate, query: EndpointQuery, others: tuple[EndpointCandidate, ...]
    ) -> ScoredCandidate:
        marks = tuple(
            (rule.words, rule.mark(candidate, query, others), weight) for rule, weight in self._rules
        )
        return ScoredCandidate(candidate, round(sum(mark * weight for _, mark, weight in marks), 3), marks)

    def better(
        self, records: Iterable[Record], query: EndpointQuery, now: float, current: tuple[str, str]
    ) -> EndpointCandidate | None:
        """For a request that still waits in the queue of ``current``: another endpoint that is free now."""
        free = [
            choice.candidate
            for choice in self.rank(records, query, now, frozenset((current,)))
            if choice.candidate.free and choice.candidate.endpoint.loaded
        ]
        return free[0] if free else None

    # What happens to requests.

    def sent(self, key: tuple[str, str], query: EndpointQuery, now: float) -> None:
        """A request is sent to the endpoint ``key``."""
        memory = self._memory.setdefault(key, _Memory())
        memory.under_way += 1
        self._round += 1
        memory.last_sent = self._round
        _recent_peak(memory, now)
        memory.breaker.sent(now)
        if query.prefix:
            self._prefixes[query.prefix] = (key, now)
            self._prefixes.move_to_end(query.prefix)
            if len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)

    def began(self, key: tuple[str, str], seconds: float) -> None:
        """It was reached and the engine began to answer after so long."""
        memory = self._memory.setdefault(key, _Memory())
        memory.breaker.reached()
        memory.first_byte += (seconds - memory.first_byte) * (_LEARN if memory.first_byte else 1.0)

    def ended(self, key: tuple[str, str], ok: bool | None) -> None:
        """It is over; ``ok`` None: called off by its caller, which tells nothing."""
        memory = self._memory.get(key)
        if memory is None:
            return
        memory.under_way = max(0, memory.under_way - 1)
        self.on_request_end(key)
        if ok is None:
            memory.breaker.given_up()
        else:
            memory.success += _LEARN * ((1.0 if ok else 0.0) - memory.success)

    def failed(self, key: tuple[str, str], now: float) -> None:
        """A transport error: not reached, or the connection broke."""
        self._memory.setdefault(key, _Memory()).breaker.failed(now)

    def forget(self, records: Iterable[Record]) -> None:
        """Keep only what concerns endpoints that are in the records."""
        there = {(record.node, endpoint.id) for record in records for endpoint in record.endpoints}
        for key in [key for key, memory in self._memory.items() if key not in there and not memory.under_way]:
            del self._memory[key]

    def _last_sent(self, key: tuple[str, str]) -> int:
        """Counts up with each request: the lower, the longer ago the endpoint had one."""
        memory = self._memory.get(key)
        return memory.last_sent if memory is not None else 0

    def _sticky_to(self, prefix: str, now: float) -> tuple[str, str] | None:
        found = self._prefixes.get(prefix) if prefix else None
        return found[0] if found is not None and now - found[1] < _PREFIX_LIFE else None


def _load(endpoint: Endpoint, memory: _Memory, now: float) -> int:
    """Ours that are under way, exactly, and others' as far as the record tells of more than ours."""
    others = endpoint.active + endpoint.waiting - _recent_peak(memory, now)
    return memory.under_way + max(0, others)


def _recent_peak(memory: _Memory, now: float) -> int:
    """The most of ours that was under way in the time from which a record may be."""
    since, most, before = memory.peak
    if now - since > 2 * _RECORD_AGE:
        since, most, before = now, memory.under_way, memory.under_way
    elif now - since > _RECORD_AGE:
        since, most, before = now, memory.under_way, most
    most = max(most, memory.under_way)
    memory.peak = (since, most, before)
    return max(most, before)
