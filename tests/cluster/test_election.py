"""Leader election."""

from __future__ import annotations

import pytest

from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.election import Election, ElectionMember
from sollold.cluster.gossip.term import Term

NOBODY = Term()


def member(node: str, counter: int = 0, *, draining: bool = False) -> ElectionMember:
    return ElectionMember(node, Term(counter, node) if counter else Term(), draining)


def election(me: str, highest: Term = NOBODY) -> Election:
    return Election(me, highest, 0.0, LAN)


def test_a_new_node_waits_for_the_grace_period() -> None:
    election_ = election("a")
    verdict = election_.decide([member("a")], 0.0)
    assert (verdict.term, verdict.claim, verdict.again) == (NOBODY, False, LAN.grace)
    assert election_.decide([member("a")], LAN.grace).claim


def test_the_lowest_id_claims_first() -> None:
    live = [member("a"), member("b"), member("c")]
    for me, turn in (("a", 100.5), ("b", 101.5), ("c", 102.5)):
        election_ = election(me)
        assert election_.decide(live, 100.0).again == pytest.approx(turn)
        assert not election_.decide(live, turn - 0.01).claim
        assert election_.decide(live, turn).term == Term(1, me)


def test_the_incumbent_stays_when_a_lower_id_joins() -> None:
    verdict = election("a").decide([member("a"), member("b", 3)], 100.0)
    assert (verdict.term, verdict.claim) == (Term(3, "b"), False)


def test_the_higher_of_two_terms_wins() -> None:
    live = [member("a", 4), member("b", 5), member("c", 4)]
    for me in "abc":
        assert election(me).decide(live, 100.0).term == Term(5, "b")


def test_the_higher_node_id_wins_among_equal_counters() -> None:
    live = [member("a", 4), member("c", 4)]
    assert {election(me).decide(live, 100.0).term for me in "ac"} == {Term(4, "c")}


def test_an_old_leader_needs_a_new_term_after_the_newer_one_died() -> None:
    election_ = election("a")
    election_.decide([member("a", 5), member("b", 6)], 100.0)
    verdict = election_.decide([member("a", 5)], 101.0)
    assert verdict.term == NOBODY
    assert election_.decide([member("a", 5)], verdict.again).term == Term(7, "a")


def test_a_claim_is_above_every_observed_term() -> None:
    election_ = election("a", Term(8, "z"))
    election_.observe(Term(11, "y"))
    election_.decide([member("a")], 100.0)
    assert election_.decide([member("a")], 110.0).term == Term(12, "a")
    assert not election_.observe(Term(12, ""))
    assert election_.observe(Term(12, "b"))


def test_a_restarted_leader_has_no_claim() -> None:
    election_ = election("b", Term(6, "b"))
    live = [member("a"), member("b")]
    verdict = election_.decide(live, 100.0)
    assert verdict.term == NOBODY
    assert verdict.again == pytest.approx(100.0 + LAN.settle + LAN.patience)


def test_a_draining_node_claims_last() -> None:
    live = [member("a", draining=True), member("b")]
    assert election("b").decide(live, 100.0).again == pytest.approx(100.5)
    assert election("a").decide(live, 100.0).again == pytest.approx(101.5)


def test_a_draining_leader_keeps_leading() -> None:
    live = [member("a"), ElectionMember("b", Term(2, "b"), True)]
    assert election("a").decide(live, 100.0).term == Term(2, "b")


def test_a_claim_waits_for_the_record_of_a_live_leader() -> None:
    election_ = election("a", Term(4, "b"))
    live = [member("a"), ElectionMember("b", None, False)]
    assert election_.decide(live, 100.0).again == 100.0 + LAN.record_wait
    assert not election_.decide(live, 100.0 + LAN.record_wait).claim
    assert election_.decide(live, 100.0 + LAN.record_wait + LAN.settle).term == Term(5, "a")


def test_a_claim_for_another_node_is_ignored() -> None:
    election_ = election("a")
    live = [member("a"), ElectionMember("b", Term(9, "c"), False), member("c", 2)]
    assert election_.decide(live, 100.0).term == Term(2, "c")
