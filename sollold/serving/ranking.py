"""The rules for ranking endpoints, as data: each gives a candidate a mark; strategies weight the marks."""

from __future__ import annotations

from collections.abc import Callable

from sollold.facts import dataclass
from sollold.serving.candidate import EndpointCandidate, EndpointQuery
from sollold.serving.request import Engine

_Pool = tuple[EndpointCandidate, ...]
"""All candidates, including the one being marked."""

Mark = Callable[[EndpointCandidate, EndpointQuery, _Pool], float]


@dataclass(frozen=True, slots=True)
class Rule:
    """A function that gives a mark from 0 (bad) to 1 (good), and the words that describe it."""

    name: str
    words: str
    mark: Mark


def _backlog(candidate: EndpointCandidate) -> float:
    return candidate.load / max(1, candidate.endpoint.slots)


def _expected(candidate: EndpointCandidate, pool: _Pool) -> float:
    """Estimate the time until a new request would be done, in units of a request at the fastest endpoint."""
    speeds = [c.speed for c in pool if c.speed > 0]
    fastest = max(speeds, default=1.0)
    # An unknown speed counts as the mean, so that a new endpoint gets some requests, but not all.
    speed = candidate.speed or (sum(speeds) / len(speeds) if speeds else 1.0)
    return (_backlog(candidate) + 1.0) * fastest / speed


def _soonest(candidate: EndpointCandidate, query: EndpointQuery, pool: _Pool) -> float:
    if len(pool) == 1:
        return 1.0
    return min(_expected(c, pool) for c in pool) / _expected(candidate, pool)


def _quick(candidate: EndpointCandidate, query: EndpointQuery, pool: _Pool) -> float:
    times = [c.first_byte for c in pool if c.first_byte > 0]
    if not times or candidate.first_byte <= 0:
        return 1.0
    return min(times) / candidate.first_byte


def _same_context(candidate: EndpointCandidate, query: EndpointQuery, pool: _Pool) -> float:
    # Ollama reloads a model for a different num_ctx; llama-server serves any context that fits.
    if not query.context or candidate.engine is Engine.LLAMA:
        return 1.0
    return 1.0 if candidate.endpoint.context == query.context else 0.0


RULES = (
    Rule("loaded", "loaded", lambda candidate, query, pool: float(candidate.endpoint.loaded)),
    Rule("soonest", "done soonest", _soonest),
    Rule("least_loaded", "least loaded", lambda candidate, query, pool: 1.0 / (1.0 + _backlog(candidate))),
    Rule("quick", "answers quickly", _quick),
    Rule("same_context", "same context length", _same_context),
    Rule("sticky", "has this conversation cached", lambda candidate, query, pool: float(candidate.sticky)),
    Rule("gpu", "on a GPU", lambda candidate, query, pool: float(candidate.gpu)),
    Rule("success", "no recent errors", lambda candidate, query, pool: candidate.success),
    Rule("local", "on this node", lambda candidate, query, pool: float(candidate.local)),
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
