"""Membership: suspicions, refutations, deaths and departures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sollold.cluster.gossip.actions import Action, Change, PersistedState, Send
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import (
    Alive,
    Dead,
    Delta,
    Left,
    Ping,
    PingReq,
    Suspect,
    compound,
    decode,
    head,
)
from sollold.cluster.gossip.term import Term
from tests.cluster.gossip_core import (
    ME,
    B,
    C,
    D,
    E,
    address_of,
    alive,
    changes,
    core,
    exchange,
    mark_dead,
    only,
    receive,
    record,
    registry,
    run,
    sent,
    with_members,
)


def test_a_suspicion_is_refuted_to_its_sender_at_once() -> None:
    gossip = with_members(core(), B)
    actions = receive(gossip, B, Suspect(ME, 5, B))
    refutation = [m for m in sent(actions, address_of(B)) if isinstance(m, Alive) and m.node == ME]
    assert refutation
    assert refutation[0].incarnation == 6
    assert gossip._awareness.score == 1


def test_an_outdated_suspicion_is_not_refuted() -> None:
    gossip = with_members(core(kept=PersistedState(incarnation=9)), B)
    actions = receive(gossip, B, Suspect(ME, 5, B), Dead(ME, 9, B))
    assert not any(isinstance(m, Alive) and m.incarnation > 10 for m in sent(actions))


def test_a_refutation_clears_a_suspicion() -> None:
    gossip = with_members(core(), B, C)
    assert (Change.SUSPECTED, B) in changes(receive(gossip, C, Suspect(B, 1, C)))
    assert gossip.known.alive(B)
    assert (Change.CLEARED, B) in changes(receive(gossip, C, alive(B, 2)))


def test_outdated_gossip_does_not_revive_a_dead_node() -> None:
    gossip = with_members(core(), B, C)
    mark_dead(gossip, B)
    run(gossip, 1.0, 3.5, silent=(B,))
    assert not changes(receive(gossip, C, alive(B, 1), now=3.5))
    assert not gossip.known.alive(B)


def test_a_death_reported_by_a_partitioned_node_is_only_a_suspicion() -> None:
    """After a partition, the isolated node reports all others dead; those that refute it stay alive."""
    for answers in (True, False):
        gossip = with_members(core(), B, C, D, E)
        now = 1.0
        reported = receive(gossip, E, Dead(B, 1, E), now=now)
        while now < 3.5:
            actions = gossip.tick(now)
            for send in only(Send, actions):
                for message in decode(send.data).messages:
                    if isinstance(message, Suspect) and message.node == B and answers:
                        actions += receive(gossip, B, alive(B, 2), now=now)
            reported += actions
            now += 0.05
        assert (Change.SUSPECTED, B) in changes(reported)
        assert gossip.known.alive(B) is answers


def test_outdated_accusations_do_not_affect_a_live_node() -> None:
    gossip = with_members(core(), C)
    receive(gossip, B, alive(B, 5))
    assert not changes(receive(gossip, C, Suspect(B, 4, C), Dead(B, 4, C), Left(B, 4)))
    assert gossip.known.alive(B)


def test_a_dead_node_that_sends_is_informed_and_rejoins_by_refuting() -> None:
    gossip = with_members(core(), B, C)
    mark_dead(gossip, B)
    run(gossip, 1.0, 3.5, silent=(B,))
    assert Dead(B, 1, B) in sent(receive(gossip, B, Ping(1, ME), now=3.5), address_of(B))
    assert (Change.JOINED, B) in changes(receive(gossip, B, alive(B, 2), now=3.5))


def test_a_restarted_node_learns_its_old_incarnation_and_rejoins_at_once() -> None:
    gossip = core()
    receive(gossip, B, alive(B, 7, boot=1))
    reported = sent(receive(gossip, B, alive(B, 1, boot=2), boot=2), address_of(B))
    assert alive(B, 7, boot=1) in reported
    restarted = core(B, boot=2)
    receive(restarted, ME, alive(B, 7, boot=1))
    assert restarted._membership.own.incarnation == 8
    assert (Change.RESTARTED, B) in changes(receive(gossip, B, alive(B, 8, boot=2), boot=2))


def test_a_clone_is_reported_and_refutations_are_limited() -> None:
    gossip = with_members(core(), B)
    reported = []
    for turn in range(50):
        incarnation = gossip._membership.own.incarnation + 1
        reported += changes(receive(gossip, B, Alive(ME, 99, incarnation, ()), now=1.0 + turn / 1000))
    assert reported.count((Change.CLONED, ME)) == 1
    assert gossip._membership.own.incarnation < 60
    for turn in range(600):  # ten minutes, with one message of the clone per second
        incarnation = gossip._membership.own.incarnation + 1
        reported += changes(receive(gossip, B, Alive(ME, 99, incarnation, ()), now=2.0 + turn))
    assert reported.count((Change.CLONED, ME)) <= 11, "reports are rate-limited"
    assert gossip._membership.own.incarnation < 150


def test_two_clones_that_know_nobody_else_report_each_other_once() -> None:
    gossip, clone = core(boot=1), core(boot=2)

    def deliver(core: Gossip, actions: list[Action], now: float) -> list[Action]:
        return [
            action
            for send in only(Send, actions)
            for action in core.handle_packet(send.data, address_of(C), now)
        ]

    hello = gossip.introduce((address_of(B),), 0.1)
    assert only(Send, hello)
    answer = deliver(clone, hello, 0.1)
    assert changes(answer) == [(Change.CLONED, ME)]
    back = deliver(gossip, answer, 0.2)
    assert changes(back) == [(Change.CLONED, ME)]
    assert not deliver(clone, back, 0.3), "the two must not answer each other for ever"
    assert not deliver(gossip, hello, 70.0), "an own packet that came back is not a clone's"
    assert changes(deliver(clone, hello, 70.0)) == [(Change.CLONED, ME)]


def test_a_node_may_change_its_addresses() -> None:
    gossip = with_members(core(), B)
    new = ("10.7.7.7", 11436)
    assert (Change.MOVED, B) in changes(receive(gossip, C, alive(B, 2, where=new)))
    assert gossip.known.addresses(B)[0] == new
    assert gossip.known.lost_hosts(B) == {address_of(B)[0]}
    both = Alive(B, 1, 3, (new, ("10.7.7.8", 11436)))
    assert (Change.MOVED, B) in changes(receive(gossip, C, both))
    assert not gossip.known.lost_hosts(B), "an additional address is not a lost one"


def test_the_source_address_of_a_peer_is_preferred() -> None:
    gossip = core()
    receive(gossip, B, Alive(B, 1, 1, (("172.17.0.1", 11436), address_of(B))))
    assert gossip.known.addresses(B)[0] == address_of(B)


@pytest.mark.parametrize("host", ["example.org", "fe80::1%.."])
def test_invalid_ids_and_addresses_are_ignored(host: str) -> None:
    gossip = core()
    receive(gossip, C, Alive("not a node's id!", 1, 1, ()), Alive(B, 1, 1, ((host, 1),)))
    assert not gossip.known.alive(B)
    assert gossip.known.contacts() == ()


def test_a_claim_of_the_highest_possible_term_is_rejected() -> None:
    gossip = with_members(core(), B)
    forger = registry(replace(record(B), claim=Term(2**64 - 1, B)))
    receive(gossip, B, decode(compound(head(B, 1), [forger.delta(1300, 1300)])).messages[0])
    assert gossip.known.rejected == 1
    mark_dead(gossip, B)
    run(gossip, 1.0, 20.0, silent=(B,))
    assert gossip.known.leader() == Term(1, ME)


def test_the_number_of_members_is_limited() -> None:
    gossip = with_members(core(), B)
    for number in range(6000):
        receive(gossip, B, alive(f"{number + 100:016x}"))
    assert len(gossip.known.contacts()) <= 4096
    assert gossip.known.alive(B)


def test_a_record_of_an_unknown_node_is_ignored() -> None:
    gossip, stranger = with_members(core(), B), core(D, boot=3)
    exchange(stranger, core(E, boot=4), 0.5)
    news = next(m for m in sent(run(stranger, 0.5, 1.0)) if isinstance(m, Delta) and m.node == D)
    receive(gossip, B, news)
    assert gossip.known.record(D) is None
    receive(gossip, B, news, alive(D, boot=3))
    assert gossip.known.record(D) == stranger.known.me


def test_host_names_in_an_indirect_ping_are_not_resolved() -> None:
    gossip = with_members(core(), B)
    actions = receive(gossip, B, PingReq(1, C, (("example.org", 80), address_of(C))))
    assert {send.address for send in only(Send, actions)} <= {address_of(B), address_of(C)}


def test_leaving_is_announced_and_not_refuted() -> None:
    gossip = with_members(core(), B, C)
    assert any(isinstance(m, Left) and m.node == ME for m in sent(gossip.leave(5.0)))
    assert not any(isinstance(m, Alive) and m.node == ME for m in sent(receive(gossip, B, Left(ME, 1))))


def test_a_node_that_left_is_removed_without_suspicion() -> None:
    gossip = with_members(core(), B, C)
    assert changes(receive(gossip, B, Left(B, 1))) == [(Change.LEFT, B)]
    assert not gossip.known.alive(B)
