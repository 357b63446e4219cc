"""Which endpoint answers. Pure: records in, a ranked list with reasons out; no network hop to decide.

The rules are data. Each gives a candidate a mark from 0 to 1; a strategy is a choice of weights. What the
router remembers of its own: requests it has under way, how endpoints did of late, which one had the
beginning of a conversation (its KV cache may still hold it). All of it bounded.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sollold.cluster.record import Backend, Endpoint, InOllama, Record, State
from sollold.machine.device import Kind
from sollold.placement.ollama_room import ollama_room
from sollold.serving.ask import Engine
from sollold.serving.breaker import Breaker

_PREFIXES = 4096
_PREFIX_LIFE = 600.0
_LEARN = 0.3
_MARGIN = 1.2
"""Bytes that a model takes for each of its files', with a context of the usual size."""
_USUAL_CONTEXT = 4096
"""Tokens up to which the margin holds the context too."""
_RECORD_AGE = 1.5
"""Seconds that a record may be old when it is looked at."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs of an endpoint.

    Attributes:
        digest: the content's; it goes before the name.
        in_ollama: what Ollamas call the content.
        size: bytes of the model's files; 0 when unknown.
        sharded: the settings want it spread over machines, whatever an Ollama could hold.
        told: (node, endpoint) that the leader named: it knows better than what is guessed here.
    """

    model: str
    engines: frozenset[Engine]
    context: int = 0
    prefix: str = ""
    embedding: bool = False
    digest: str = ""
    in_ollama: InOllama = field(default_factory=InOllama)
    size: int = 0
    sharded: bool = False
    told: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that could answer, and what the rules look at.

    ``load``: requests in it and in its line, ours that its record can't know yet included.
    """

    record: Record
    endpoint: Endpoint
    local: bool
    gpu: bool
    load: int
    speed: float
    first_byte: float
    success: float
    sticky: bool

    @property
    def key(self) -> tuple[str, str]:
        """Node and endpoint."""
        return self.record.node, self.endpoint.id

    @property
    def engine(self) -> Engine:
        """Who computes there."""
        return engine_of(self.endpoint)

    @property
    def free(self) -> bool:
        """Whether a request would begin at once."""
        return self.load < self.endpoint.slots


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate with its score and why it has it."""

    candidate: Candidate
    score: float
    why: str


Mark = Callable[[Candidate, Wish, tuple[Candidate, ...]], float]


@dataclass(frozen=True, slots=True)
class Rule:
    """A mark from 0 (bad) to 1 (good) and the words for it."""

    name: str
    words: str
    mark: Mark


def engine_of(endpoint: Endpoint) -> Engine:
    """Who computes at an endpoint."""
    return Engine.OLLAMA if endpoint.backend is Backend.OLLAMA else Engine.LLAMA


def _loaded(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return 1.0 if candidate.endpoint.loaded else 0.0


def _expected(candidate: Candidate, all_: tuple[Candidate, ...]) -> float:
    """Time until a new request would be done there, in requests of the fastest endpoint."""
    known = [other.speed for other in all_ if other.speed > 0]
    fastest = max(known, default=1.0)
    # Unknown counts as the mean, so that a new endpoint is tried, and not with everything.
    speed = candidate.speed or (sum(known) / len(known) if known else 1.0)
    ahead = candidate.load / max(1, candidate.endpoint.slots)
    return (ahead + 1.0) * fastest / speed


def _soonest(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return min(_expected(other, all_) for other in all_) / _expected(candidate, all_)


def _least_loaded(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return 1.0 / (1.0 + candidate.load / max(1, candidate.endpoint.slots))


def _quick(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    known = [other.first_byte for other in all_ if other.first_byte > 0]
    if not known or candidate.first_byte <= 0:
        return 1.0
    return min(known) / candidate.first_byte


def _same_context(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    # An Ollama reloads a model whose num_ctx differs; llama-server serves what fits.
    if not wish.context or candidate.engine is Engine.LLAMA:
        return 1.0
    return 1.0 if candidate.endpoint.context == wish.context else 0.0


def _sticky(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return 1.0 if candidate.sticky else 0.0


def _gpu(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return 1.0 if candidate.gpu else 0.0


def _success(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return candidate.success


def _local(candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> float:
    return 1.0 if candidate.local else 0.0


RULES = (
    Rule("loaded", "loaded", _loaded),
    Rule("soonest", "done soonest", _soonest),
    Rule("least_loaded", "least loaded", _least_loaded),
    Rule("quick", "answers quickly", _quick),
    Rule("same_context", "same context length", _same_context),
    Rule("sticky", "had this conversation", _sticky),
    Rule("gpu", "on a GPU", _gpu),
    Rule("success", "no errors of late", _success),
    Rule("local", "on this node", _local),
)

STRATEGIES: dict[str, dict[str, float]] = {
    "intelligent": {
        "loaded": 40.0,
        "soonest": 100.0,
        "same_context": 20.0,
        "sticky": 15.0,
        "gpu": 10.0,
        "success": 30.0,
        "local": 1.0,
    },
    "least_loaded": {"least_loaded": 100.0, "loaded": 5.0, "local": 1.0},
    "latency_first": {"quick": 100.0, "loaded": 40.0, "least_loaded": 20.0, "local": 1.0},
    "round_robin": {},
}


@dataclass(slots=True)
class _Memory:
    """What the router remembers of one endpoint."""

    under_way: int = 0
    turn: int = 0
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
        self._strategy = strategy
        self._weights = STRATEGIES[strategy]
        self._memory: dict[tuple[str, str], _Memory] = {}
        self._prefixes: OrderedDict[str, tuple[tuple[str, str], float]] = OrderedDict()
        self._round = 0
        self._on_end: list[Callable[[tuple[str, str]], None]] = []

    def subscribe(self, callback: Callable[[tuple[str, str]], None]) -> None:
        """Call ``callback`` with the endpoint whenever a request there is over."""
        self._on_end.append(callback)

    def candidates(self, records: Iterable[Record], wish: Wish, now: float) -> tuple[Candidate, ...]:
        """Endpoints that could answer ``wish`` now; those behind an open breaker are left out."""
        sticky = self._sticky_to(wish.prefix, now)
        found = []
        for record in records:
            if record.draining:
                continue
            for endpoint in record.endpoints:
                key = (record.node, endpoint.id)
                if not _fits(endpoint, wish) or not (key == wish.told or _at_hand(record, endpoint, wish)):
                    continue
                memory = self._memory.get(key) or _Memory()
                if not memory.breaker.allows(now):
                    continue
                found.append(
                    Candidate(
                        record,
                        endpoint,
                        local=record.node == self._me,
                        gpu=_on_gpu(record, endpoint),
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
        wish: Wish,
        now: float,
        without: frozenset[tuple[str, str]] = frozenset(),
    ) -> tuple[Choice, ...]:
        """The candidates, the best first; ``without`` those just tried in vain."""
        all_ = tuple(c for c in self.candidates(records, wish, now) if c.key not in without)
        if not self._weights:
            ordered = sorted(all_, key=lambda c: (self._turn_of(c.key), c.key))
            return tuple(Choice(c, 0.0, "its turn") for c in ordered)
        choices = [self._score(candidate, wish, all_) for candidate in all_]
        # Ties go by a digest, so that nodes that know the same do not all choose the same endpoint.
        choices.sort(key=lambda c: (-c.score, zlib.crc32(f"{self._me}{c.candidate.key}".encode())))
        return tuple(choices)

    def _score(self, candidate: Candidate, wish: Wish, all_: tuple[Candidate, ...]) -> Choice:
        score = 0.0
        reasons = []
        for rule in RULES:
            weight = self._weights.get(rule.name, 0.0)
            if weight:
                mark = rule.mark(candidate, wish, all_)
                score += weight * mark
                reasons.append(f"{rule.words} {mark:.2f}×{weight:g}")
        return Choice(candidate, round(score, 3), ", ".join(reasons))

    def better(
        self, records: Iterable[Record], wish: Wish, now: float, current: tuple[str, str]
    ) -> Candidate | None:
        """For a request that still stands in line at ``current``: another endpoint that is free now."""
        free = [
            choice.candidate
            for choice in self.rank(records, wish, now, frozenset((current,)))
            if choice.candidate.free and choice.candidate.endpoint.loaded
        ]
        return free[0] if free else None

    # What happens to requests.

    def sent(self, key: tuple[str, str], wish: Wish, now: float) -> None:
        """A request goes to the endpoint ``key``."""
        memory = self._memory.setdefault(key, _Memory())
        memory.under_way += 1
        self._round += 1
        memory.turn = self._round
        _recent_peak(memory, now)
        memory.breaker.sent(now)
        if wish.prefix:
            self._prefixes[wish.prefix] = (key, now)
            self._prefixes.move_to_end(wish.prefix)
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
        for callback in self._on_end:
            callback(key)
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

    def _turn_of(self, key: tuple[str, str]) -> int:
        """Counts up with each request: the lower, the longer ago the endpoint had one."""
        memory = self._memory.get(key)
        return memory.turn if memory is not None else 0

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


def _fits(endpoint: Endpoint, wish: Wish) -> bool:
    if endpoint.state is not State.READY or endpoint.closing:
        return False
    if not endpoint.is_of(wish.model, wish.digest, wish.in_ollama):
        return False
    engine = engine_of(endpoint)
    if engine not in wish.engines:
        return False
    if engine is Engine.OLLAMA:
        return True
    return endpoint.embedding == wish.embedding and endpoint.context >= wish.context


def _at_hand(record: Record, endpoint: Endpoint, wish: Wish) -> bool:
    """Whether it surely can answer without the leader being asked first.

    A model that an Ollama has not loaded needs room there. The leader knows the footprint; here it is
    guessed, and what is not clear is left to it.
    """
    if endpoint.loaded or engine_of(endpoint) is Engine.LLAMA:
        return True
    return not wish.sharded and wish.context <= _USUAL_CONTEXT and wish.size * _MARGIN <= ollama_room(record)


def _on_gpu(record: Record, endpoint: Endpoint) -> bool:
    if endpoint.placed:
        return all(placed.device != "CPU" for placed in endpoint.placed if placed.last > placed.first)
    return any(device.kind is Kind.GPU for device in record.devices)
