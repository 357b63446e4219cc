"""Who leads."""

from __future__ import annotations

import pytest

from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.election import Election, ElectionMember
from sollold.cluster.gossip.term import Term

NOBODY = Term()


def standing(node: str, counter: int = 0, *, draining: bool = False) -> ElectionMember:
    return ElectionMember(node, Term(counter, node) if counter else Term(), draining)


def election(me: str, highest: Term = NOBODY) -> Election:
    return Election(me, highest, 0.0, LAN)


def test_a_node_that_just_started_waits() -> None:
    one = election("a")
    verdict = one.decide([standing("a")], 0.0)
    assert (verdict.term, verdict.claim, verdict.again) == (NOBODY, False, LAN.grace)
    assert one.decide([standing("a")], LAN.grace).claim


def test_the_lowest_id_is_first_in_line() -> None:
    live = [standing("a"), standing("b"), standing("c")]
    for me, turn in (("a", 100.5), ("b", 101.5), ("c", 102.5)):
        one = election(me)
        assert one.decide(live, 100.0).again == pytest.approx(turn)
        assert not one.decide(live, turn - 0.01).claim
        assert one.decide(live, turn).term == Term(1, me)


def test_the_incumbent_stays_when_a_lower_id_joins() -> None:
    verdict = election("a").decide([standing("a"), standing("b", 3)], 100.0)
    assert (verdict.term, verdict.claim) == (Term(3, "b"), False)


def test_where_two_leaders_meet_the_higher_term_stays() -> None:
    live = [standing("a", 4), standing("b", 5), standing("c", 4)]
    for me in "abc":
        assert election(me).decide(live, 100.0).term == Term(5, "b")


def test_equal_counters_are_told_apart_by_the_node() -> None:
    live = [standing("a", 4), standing("c", 4)]
    assert {election(me).decide(live, 100.0).term for me in "ac"} == {Term(4, "c")}


def test_an_older_leader_does_not_come_back_when_the_newer_dies() -> None:
    one = election("a")
    one.decide([standing("a", 5), standing("b", 6)], 100.0)
    verdict = one.decide([standing("a", 5)], 101.0)
    assert verdict.term == NOBODY
    assert one.decide([standing("a", 5)], verdict.again).term == Term(7, "a")


def test_a_claim_is_above_all_that_was_ever_seen() -> None:
    one = election("a", Term(8, "z"))
    one.observe(Term(11, "y"))
    one.decide([standing("a")], 100.0)
    assert one.decide([standing("a")], 110.0).term == Term(12, "a")
    assert not one.observe(Term(12, ""))
    assert one.observe(Term(12, "b"))


def test_a_restarted_leader_has_no_claim_any_more() -> None:
    one = election("b", Term(6, "b"))
    live = [standing("a"), standing("b")]
    verdict = one.decide(live, 100.0)
    assert verdict.term == NOBODY
    assert verdict.again == pytest.approx(100.0 + LAN.settle + LAN.patience)


def test_who_drains_is_last_in_line() -> None:
    live = [standing("a", draining=True), standing("b")]
    assert election("b").decide(live, 100.0).again == pytest.approx(100.5)
    assert election("a").decide(live, 100.0).again == pytest.approx(101.5)


def test_a_leader_that_drains_goes_on_leading() -> None:
    live = [standing("a"), ElectionMember("b", Term(2, "b"), True)]
    assert election("a").decide(live, 100.0).term == Term(2, "b")


def test_the_record_of_a_live_leader_is_waited_for() -> None:
    one = election("a", Term(4, "b"))
    live = [standing("a"), ElectionMember("b", None, False)]
    assert one.decide(live, 100.0).again == 100.0 + LAN.record_wait
    assert not one.decide(live, 100.0 + LAN.record_wait).claim
    assert one.decide(live, 100.0 + LAN.record_wait + LAN.settle).term == Term(5, "a")


def test_a_claim_in_the_name_of_another_is_ignored() -> None:
    one = election("a")
    live = [standing("a"), ElectionMember("b", Term(9, "c"), False), standing("c", 2)]
    assert one.decide(live, 100.0).term == Term(2, "c")
