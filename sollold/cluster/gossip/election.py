"""Decides who leads: the holder of the highest term while it is alive, else the best-ranked node claims a
higher one.

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


_NO_TERM = Term()


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
        for member in standings:
            if member.claim is not None and member.claim.leader == member.node:
                self.observe(member.claim)
        self._forget_invented(standings)
        holder = next((member for member in standings if member.node == self.highest.leader), None)
        if holder is not None and holder.claim == self.highest:
            self._vacant = self._missing = None
            return ElectionResult(self.highest)
        if holder is not None and holder.claim is None:
            # Its record is on its way; without this wait a joining node would unseat it.
            if self._missing is None:
                self._missing = now
            deadline = self._missing + self._tuning.record_wait
            if now < deadline:
                return ElectionResult(_NO_TERM, again=deadline)
        else:
            self._missing = None
        if self._vacant is None:
            self._vacant = now
        own_rank = min(
            ((m.draining, m.node) for m in standings if m.node == self._me),
            default=(True, ""),
        )
        place = sum((member.draining, member.node) < own_rank for member in standings)
        turn = max(self._vacant + self._tuning.settle, self._started + self._tuning.grace)
        turn += place * self._tuning.patience
        if now < turn:
            return ElectionResult(_NO_TERM, again=turn)
        self.highest = Term(self.highest.counter + 1, self._me)
        self._vacant = self._missing = None
        return ElectionResult(self.highest, claim=True)

    def _forget_invented(self, standings: tuple[ElectionMember, ...]) -> None:
        """Forget a highest term that no live node holds and that is out of reach of all who lead or led.

        A new node accepts a high claim; if that was false, others would never accept this node's terms.
        """
        claims = [member.claim for member in standings if member.claim is not None and member.claim.counter]
        if not claims or any(member.node == self.highest.leader for member in standings):
            return
        reached = max(claims)
        if not follows(self.highest, reached):
            self.highest = reached
