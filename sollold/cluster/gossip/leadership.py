"""This node's part in elections: takes the live nodes' records, yields claims and the current term."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.election import Election, ElectionMember
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.registry import Registry
from sollold.cluster.gossip.term import Term
from sollold.cluster.gossip.timers import Timers


class Leadership:
    """Runs the election whenever something relevant changed.

    Args:
        highest: the highest term seen by earlier processes.
        persist: requests that `highest` is written to disk; `persisted` must follow.
        elected: called whenever the current term changes.

    Attributes:
        due: something changed; `run` must decide again.
        term: the current term; ``leader`` is empty while there is none.
        claiming: the claim that is being written to disk; it is not announced before.
    """

    def __init__(
        self,
        membership: Membership,
        registry: Registry,
        highest: Term,
        now: float,
        *,
        tuning: Tuning,
        timers: Timers,
        persist: Callable[[], None],
        elected: Callable[[Term], None],
    ) -> None:
        self.due = True
        self.term = Term()
        self.claiming: Term | None = None
        self._membership = membership
        self._registry = registry
        self._timers = timers
        self._persist = persist
        self._elected = elected
        self._decide_at = float("inf")
        self._election = Election(membership.me, highest, now, tuning)

    @property
    def highest(self) -> Term:
        """The highest term seen; new claims are above it."""
        return self._election.highest

    def observe(self, term: Term) -> None:
        """Note a term that was seen."""
        if self._election.observe(term):
            self.due = True

    def persisted(self, term: Term) -> Term | None:
        """Note that ``term`` is on disk. Returns the claim that waited for it; None if it was superseded."""
        claim = self.claiming
        if claim is None or term < claim:
            return None
        self.claiming = None
        self.due = True
        return claim if claim == self.highest and not self._membership.own.leaving else None

    def run(self, now: float) -> None:
        """Run the election; claim the next term if it is this node's turn."""
        self.due = False
        if self._membership.own.leaving:
            return
        if self._membership.own.withdrawn:
            # The other process leads with this id, or may: two would give orders in one name.
            self.claiming = None
            if self.term != Term():
                self.term = Term()
                self._elected(self.term)
            return
        if self.claiming is not None and self.claiming == self.highest:
            return
        verdict = self._election.decide(self._standings(), now)
        if verdict.claim:
            self.claiming = verdict.term
            self._persist()
            return
        if verdict.again < float("inf") and verdict.again != self._decide_at:
            self._decide_at = verdict.again
            self._timers.at(verdict.again, self._decide_again)
        if verdict.term != self.term:
            self.term = verdict.term
            self._elected(verdict.term)

    def _decide_again(self, now: float) -> None:
        self._decide_at = float("inf")
        self.due = True

    def _standings(self) -> Iterator[ElectionMember]:
        for node in (self._membership.me, *self._membership.live):
            register = self._registry.get(node)
            if register is None:
                yield ElectionMember(node, None, False)
            else:
                yield ElectionMember(node, register.record.claim, register.record.draining)
