"""Predicts how much faster drafts make an answer. Pure. Seconds throughout.

A round of llama-server reads the weights once and makes one trip to each worker, however many tokens it
checks. Each drafted token adds its computing and its bytes on the links. So a round with drafts is longer and
yields more than one token. How many tokens are accepted can only be guessed before a model has answered
(`NGRAM_PRIOR`, `MTP_PRIOR`, `draft_prior`); from then on it is measured (`AcceptanceHistory`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sollold.bounded import BoundedDict
from sollold.facts import dataclass

KEPT = 512
"""Maximum number of remembered (model, drafter) pairs."""
ENOUGH = 256
"""Tokens after which measurements replace the assumed values."""
MOST = 20_000
"""Tokens above which all counts are halved, so that older answers count less: a model's use changes."""
EXPIRES = 7 * 86400.0
"""Seconds after which measurements are no longer used."""


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Quality of drafts: share of rounds that draft, and chance that each next drafted token is right."""

    share: float
    acceptance: float

    def accepted(self, length: int) -> float:
        """Return the mean number of accepted tokens in a draft of this length."""
        return sum(self.acceptance**position for position in range(1, length + 1))


NGRAM_PRIOR = DraftStats(0.03, 0.8)
"""Assumed for text in general, which repeats little of the conversation. N-gram drafts pay if a batch costs
hardly more than a token."""


MTP_PRIOR = DraftStats(1.0, 0.7)
"""Assumed for a model's own layer for next-token prediction, which is trained for the first drafted token and
drafts the others from its own results."""


def draft_prior(weights: int, target: int) -> DraftStats:
    """Return the assumed values of a draft model: the smaller it is, the less often it is right."""
    if weights <= 0 or target <= 0:
        return DraftStats(1.0, 0.5)
    chance, ratio = 0.75, target / weights
    while ratio > 8 and chance > 0.45:
        chance, ratio = chance - 0.05, ratio / 2
    return DraftStats(1.0, chance)


def gain(stats: DraftStats, length: int, single: float, batch: float, drafting: float) -> float:
    """Return tokens per second with drafts divided by those without.

    Args:
        length: tokens drafted at a time.
        single, batch: seconds of a round with one token, and with one token and a whole draft.
        drafting: seconds to make one draft.
    """
    if single <= 0:
        return 1.0
    tokens = 1 + stats.share * stats.accepted(length)
    rounds = single + stats.share * (batch + drafting - single)
    return tokens * single / rounds


@dataclass(frozen=True, slots=True)
class Measured:
    """Counts of drafts for ``model`` (a digest) by a draft model, `NGRAM` or `MTP`; ``at``: Unix time."""

    model: str
    by: str
    length: int
    tokens: int
    drafted: int
    accepted: int
    at: float

    @property
    def stats(self) -> DraftStats:
        """The statistics that these counts imply."""
        rounds = max(self.tokens - self.accepted, 1)
        drafts = self.drafted / max(self.length, 1)
        return DraftStats(
            min(drafts / rounds, 1.0), _chance(self.accepted / drafts if drafts else 0.0, self.length)
        )


def _chance(mean: float, length: int) -> float:
    """Return the chance per token at which the mean number of accepted tokens is ``mean``."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if DraftStats(1.0, middle).accepted(length) < mean else (low, middle)
    return high if mean > 0 else 0.0


class AcceptanceHistory:
    """Remembers measured drafts, by pair of model and drafter."""

    def __init__(self, facts: Iterable[Measured] = ()) -> None:
        self._facts: BoundedDict[tuple[str, str], Measured] = BoundedDict(KEPT)
        for fact in filter(_is_plausible, facts):
            self._facts[fact.model, fact.by] = fact

    def facts(self) -> tuple[Measured, ...]:
        """Return all measurements, for storing on disk."""
        return tuple(self._facts.values())

    def stats(self, model: str, by: str, now: float) -> DraftStats | None:
        """Return the statistics of a pair; None when they are too few or too old."""
        fact = self._facts.get((model, by))
        if fact is None or fact.tokens < ENOUGH or not 0 <= now - fact.at < EXPIRES:
            return None
        return fact.stats

    def learn(self, fact: Measured) -> None:
        """Add the counts of further answers of a pair."""
        if not _is_plausible(fact):
            return
        key = fact.model, fact.by
        old = self._facts.get(key)
        if old is not None and old.length == fact.length and fact.at - old.at < EXPIRES:
            fact = replace(
                fact,
                tokens=old.tokens + fact.tokens,
                drafted=old.drafted + fact.drafted,
                accepted=old.accepted + fact.accepted,
            )
        while fact.tokens > MOST:
            counts = fact.tokens // 2, fact.drafted // 2, fact.accepted // 2
            fact = replace(fact, tokens=counts[0], drafted=counts[1], accepted=counts[2])
        self._facts[key] = fact


def _is_plausible(fact: Measured) -> bool:
    return fact.length > 0 and fact.tokens > 0 and 0 <= fact.accepted <= min(fact.drafted, fact.tokens)
