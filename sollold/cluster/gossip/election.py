"""Who leads: the holder of the highest term as long as it lives, else the first in line claims a higher one.

There is no voting. A leader only proposes; owners decide by their own ledgers and refuse terms older than
the newest they have seen. So all that is required is that views agree within seconds, and that a node that
joins unseats nobody. Terms are totally ordered by (counter, node id): when two halves of a network meet,
both know which of the two leaders stays.
"""

from __future__ import annotations

from collections.abc import Iterable

from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.term import Term, follows
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class ElectionMember:
    """A live node's part in elections. ``claim`` is None while its record is missing."""

    node: str
    claim: Term | None
    draining: bool


@dataclass(frozen=True, slots=True)
class ElectionResult:
    """``term``: the current one (empty: none). ``claim``: claim it now. ``again``: when to decide again."""

    term: Term
    claim: bool = False
    again: float = float("inf")


_NOBODY = Term()


class Election:
    """One node's view of who leads.

    Args:
        me: node id.
        highest: the highest term seen by earlier processes.
        started: monotonic seconds.
    """

    def __init__(self, me: str, highest: Term, started: float, tuning: Tuning) -> None:
        self._me = me
        self.highest = highest
        self._tuning = tuning
        self._started = started
        self._vacant: float | None = None
        self._missing: float | None = None

    def observe(self, term: Term) -> bool:
        """Note a term; True if it is the highest so far. One that elections can't have reached is ignored."""
        if term <= self.highest or not follows(term, self.highest):
            return False
        self.highest = term
        return True

    def decide(self, live: Iterable[ElectionMember], now: float) -> ElectionResult:
        """Decide who leads among the live nodes, including this one; a returned claim counts as made."""
        standings = tuple(live)
        for one in standings:
            if one.claim is not None and one.claim.leader == one.node:
                self.observe(one.claim)
        self._forget_invented(standings)
        holder = next((one for one in standings if one.node == self.highest.leader), None)
        if holder is not None and holder.claim == self.highest:
            self._vacant = self._missing = None
            return ElectionResult(self.highest)
        if holder is not None and holder.claim is None:
            # Its record is on its way; without this wait a joining node would unseat it.
            if self._missing is None:
                self._missing = now
            until = self._missing + self._tuning.record_wait
            if now < until:
                return ElectionResult(_NOBODY, again=until)
        else:
            self._missing = None
        if self._vacant is None:
            self._vacant = now
        mine = min(
            ((one.draining, one.node) for one in standings if one.node == self._me), default=(True, "")
        )
        place = sum((one.draining, one.node) < mine for one in standings)
        turn = max(self._vacant + self._tuning.settle, self._started + self._tuning.grace)
        turn += place * self._tuning.patience
        if now < turn:
            return ElectionResult(_NOBODY, again=turn)
        self.highest = Term(self.highest.counter + 1, self._me)
        self._vacant = self._missing = None
        return ElectionResult(self.highest, claim=True)

    def _forget_invented(self, standings: tuple[ElectionMember, ...]) -> None:
        """Forget a highest term that no live node holds and that is out of reach of all who lead or led.

        A new node accepts a high claim; if that was false, others would never accept this node's terms.
        """
        claims = [one.claim for one in standings if one.claim is not None and one.claim.counter]
        if not claims or any(one.node == self.highest.leader for one in standings):
            return
        reached = max(claims)
        if not follows(self.highest, reached):
            self.highest = reached
