"""The gossip core: the actions that follow each call."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.actions import Change, NodeEvent, Persist, PersistedState
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Ack, Delta, Ping
from sollold.cluster.gossip.term import Term
from tests.cluster.gossip_core import (
    ME,
    B,
    C,
    alive,
    core,
    exchange,
    mark_dead,
    only,
    receive,
    run,
    sent,
    with_members,
)


def test_the_first_action_persists_term_version_and_incarnation() -> None:
    actions = core(kept=PersistedState(Term(3, B), 100, 8)).tick(0.0)
    assert isinstance(actions[0], Persist)
    assert actions[0].kept.term == Term(3, B)
    assert actions[0].kept.version > 101
    assert actions[0].kept.incarnation == 9


def test_a_lone_node_leads_after_the_grace_period() -> None:
    gossip = core()
    actions = run(gossip, 0.0, LAN.grace + LAN.settle)
    assert gossip.known.leader() == Term(1, ME)
    assert gossip.known.me.claim == Term(1, ME)
    kept = [action.kept.term for action in only(Persist, actions)]
    assert Term(1, ME) in kept


def test_a_claim_is_persisted_before_it_is_published() -> None:
    gossip = with_members(core(), B)
    actions = run(gossip, 0.6, 10.0)
    persisted = next(
        i for i, action in enumerate(actions) if isinstance(action, Persist) and action.kept.term.counter
    )
    published = next(
        i
        for i, action in enumerate(actions)
        if isinstance(action, NodeEvent) and action.change is Change.LEADER
    )
    assert persisted < published
    assert not any(
        isinstance(message, Delta) and message.node == ME and message.version > 1
        for message in sent(actions[:persisted])
    )


def unwritten_claim(gossip: Gossip) -> Persist:
    """Run ``gossip`` until it persists a claim; return that action, whose write has not completed."""
    now = 0.0
    while True:
        for persist in only(Persist, gossip.tick(now)):
            if persist.kept.term.leader:
                return persist
        now = max(now, gossip.next_wake())


def test_only_the_claim_waits_for_the_disk() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    assert persist.kept.term == Term(1, ME)
    assert (gossip.known.leader(), gossip.known.me.claim) == (Term(), Term())
    answers = sent(receive(gossip, B, alive(B), Ping(9, ME), now=4.0))
    assert any(isinstance(message, Ack) for message in answers)
    gossip.persisted(persist.kept, 5.0)
    assert gossip.known.leader() == gossip.known.me.claim == Term(1, ME)


def test_a_claim_is_dropped_if_a_higher_term_arrives_before_it_is_persisted() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    other = core(B, boot=3, kept=PersistedState(Term(6, "")))
    run(other, 0.0, 5.0)
    exchange(gossip, other, 5.0)
    gossip.persisted(persist.kept, 5.1)
    assert gossip.known.me.claim == Term()
    assert gossip.known.leader() == Term(7, B)


def test_the_version_increases_only_with_changes() -> None:
    gossip = core()
    version = gossip.known.me.version
    gossip.update_record(replace(gossip.known.me, build="b1"), 1.0)
    gossip.update_record(replace(gossip.known.me, build="b1", version=0, claim=Term(9, B)), 1.0)
    assert gossip.known.me.version == version + 1
    assert gossip.known.me.claim == Term()


def test_a_claim_is_above_every_observed_term() -> None:
    gossip, other = core(), core(B, boot=3, kept=PersistedState(Term(39, "")))
    run(other, 0.0, 5.0)
    actions = exchange(gossip, other, 5.0)
    assert Term(40, B) in [action.kept.term for action in only(Persist, actions)]
    mark_dead(with_members(gossip, C, now=6.0), B, now=6.0)
    run(gossip, 6.0, 16.0)
    assert gossip.known.leader() == Term(41, ME)


def test_a_leader_steps_down_when_it_hears_of_a_higher_term() -> None:
    first, second = core(ME), core(B, boot=3, kept=PersistedState(Term(8, "")))
    run(first, 0.0, 5.0)
    run(second, 0.0, 5.0)
    assert (first.known.leader(), second.known.leader()) == (Term(1, ME), Term(9, B))
    exchange(first, second, 6.0)
    assert first.known.leader() == second.known.leader() == Term(9, B)


def test_a_dead_leader_is_replaced_within_the_settle_and_patience_times() -> None:
    gossip, leader = core(C), core(ME, boot=3, kept=PersistedState(Term(5, "")))
    run(leader, 0.0, 5.0)
    run(gossip, 0.0, 5.0)
    exchange(gossip, leader, 5.0)
    assert gossip.known.leader() == Term(6, ME)
    mark_dead(with_members(gossip, B, now=6.0), ME, now=6.0)
    assert gossip.known.leader() == Term()
    run(gossip, 6.0, 6.0 + LAN.settle + LAN.patience + 0.01)
    assert gossip.known.leader() == Term(7, C)


def test_the_record_of_a_replaced_process_does_not_count() -> None:
    observer, former, restarted = core(), core(B, boot=3), core(B, boot=5)
    exchange(former, observer, 1.0)
    former.update_record(replace(former.known.me, setup="old"), 1.0)
    exchange(former, observer, 1.0)
    assert [entry.node for entry in observer.known.live()] == [ME, B]
    for status in (False, True):
        if status:
            mark_dead(observer, B)
        receive(observer, C, alive(B, 9 + status, boot=5), now=2.0)
        assert observer.known.alive(B)
        assert [entry.node for entry in observer.known.live()] == [ME]
    exchange(restarted, observer, 3.0)
    exchange(restarted, observer, 3.0)
    assert [(entry.node, entry.setup) for entry in observer.known.live()] == [(ME, ""), (B, "")]
