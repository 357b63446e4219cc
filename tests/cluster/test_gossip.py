"""The gossip core, one call at a time: what comes in, which actions go out."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.actions import Change, NodeEvent, Persist, PersistedState
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Ack, Ping
from sollold.cluster.gossip.term import Term
from tests.cluster.gossip_core import ME, B, C, alive, bury, core, exchange, know, of, play, says, sent


def test_the_first_thing_is_to_write_what_must_survive() -> None:
    actions = core(kept=PersistedState(Term(3, B), 100, 8)).tick(0.0)
    assert isinstance(actions[0], Persist)
    assert actions[0].kept.term == Term(3, B)
    assert actions[0].kept.version > 101
    assert actions[0].kept.incarnation == 9


def test_a_lone_node_leads_after_its_grace() -> None:
    gossip = core()
    actions = play(gossip, 0.0, LAN.grace + LAN.settle)
    assert gossip.known.leader() == Term(1, ME)
    assert gossip.known.me.claim == Term(1, ME)
    kept = [action.kept.term for action in of(Persist, actions)]
    assert Term(1, ME) in kept


def test_a_claim_is_on_disk_before_anybody_hears_of_it() -> None:
    gossip = know(core(), B)
    actions = play(gossip, 0.6, 10.0)
    persisted = next(
        i for i, action in enumerate(actions) if isinstance(action, Persist) and action.kept.term.counter
    )
    told = next(
        i
        for i, action in enumerate(actions)
        if isinstance(action, NodeEvent) and action.change is Change.LEADER
    )
    assert persisted < told
    assert not any(
        getattr(message, "node", "") == ME and type(message).__name__ == "Delta" and message.version > 1
        for message in sent(actions[:persisted])
    )


def unwritten_claim(gossip: Gossip) -> Persist:
    """Let ``gossip`` want to lead, with a disk that is still busy."""
    now = 0.0
    while True:
        for persist in of(Persist, gossip.tick(now)):
            if persist.kept.term.leader:
                return persist
        now = max(now, gossip.next_wake())


def test_nothing_waits_for_the_disk_but_the_claim() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    assert persist.kept.term == Term(1, ME)
    assert (gossip.known.leader(), gossip.known.me.claim) == (Term(), Term())
    answers = sent(says(gossip, B, alive(B), Ping(9, ME), now=4.0))
    assert any(isinstance(message, Ack) for message in answers)
    gossip.persisted(persist.kept, 5.0)
    assert gossip.known.leader() == gossip.known.me.claim == Term(1, ME)


def test_a_claim_is_dropped_if_a_higher_term_came_before_it_was_on_disk() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    gossip.observe_term(Term(7, B), 5.0)
    gossip.persisted(persist.kept, 5.1)
    assert gossip.known.me.claim == Term()
    play(gossip, 5.1, 12.0)
    assert gossip.known.leader() == Term(8, ME)


def test_the_version_rises_with_each_change_alone() -> None:
    gossip = core()
    version = gossip.known.me.version
    gossip.update_record(replace(gossip.known.me, build="b1"), 1.0)
    gossip.update_record(replace(gossip.known.me, build="b1", version=0, claim=Term(9, B)), 1.0)
    assert gossip.known.me.version == version + 1
    assert gossip.known.me.claim == Term()


def test_a_term_seen_elsewhere_is_never_claimed_below() -> None:
    gossip = core()
    actions = gossip.observe_term(Term(40, B), 1.0)
    assert [action.kept.term for action in of(Persist, actions)][-1] == Term(40, B)
    play(gossip, 1.0, 10.0)
    assert gossip.known.leader() == Term(41, ME)


def test_a_leader_steps_down_when_it_hears_of_a_higher_term() -> None:
    one, other = core(ME), core(B, boot=3, kept=PersistedState(Term(8, "")))
    play(one, 0.0, 5.0)
    play(other, 0.0, 5.0)
    assert (one.known.leader(), other.known.leader()) == (Term(1, ME), Term(9, B))
    exchange(one, other, 6.0)
    assert one.known.leader() == other.known.leader() == Term(9, B)


def test_the_leader_that_died_is_followed_within_two_seconds() -> None:
    gossip, leader = core(C), core(ME, boot=3, kept=PersistedState(Term(5, "")))
    play(leader, 0.0, 5.0)
    play(gossip, 0.0, 5.0)
    exchange(gossip, leader, 5.0)
    assert gossip.known.leader() == Term(6, ME)
    bury(know(gossip, B, now=6.0), ME, now=6.0)
    assert gossip.known.leader() == Term()
    play(gossip, 6.0, 6.0 + LAN.settle + LAN.patience + 0.01)
    assert gossip.known.leader() == Term(7, C)
