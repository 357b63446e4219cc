"""Introductions: a node tries addresses until a peer answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from sollold.cluster.gossip.actions import Change, PushPullWith, Send
from sollold.cluster.gossip.packet import Ack, Alive, Delta, Ping
from tests.cluster.gossip_core import (
    ME,
    B,
    C,
    address_of,
    alive,
    changes,
    core,
    mark_dead,
    only,
    receive,
    run,
    sent,
    with_members,
)


def test_a_seed_whose_addresses_rotate_is_one_introduction() -> None:
    gossip = core()
    addresses = [(f"10.9.0.{number}", 11436) for number in range(1, 8)]
    for rotated in permutations(addresses):
        gossip.introduce(rotated, 1.0, keep=True, source="pool.example:11436")
        gossip.introduce(rotated, 1.0, keep=True)
    assert {send.address for send in only(Send, gossip.introduce((address_of(B),), 1.0))} == {address_of(B)}


def test_new_addresses_of_a_seed_replace_its_old_ones() -> None:
    gossip = core()
    gossip.introduce((address_of(B),), 1.0, keep=True, source="one.example:1")
    actions = gossip.introduce((address_of(C),), 2.0, keep=True, source="one.example:1")
    assert {send.address for send in only(Send, actions)} == {address_of(C)}
    later = run(gossip, 2.0, 120.0)
    assert address_of(C) in {send.address for send in only(Send, later)}
    assert address_of(B) not in {send.address for send in only(Send, later)}


def test_an_old_address_is_tried_only_after_the_node_died() -> None:
    gossip = with_members(core(), B)
    actions = gossip.introduce((("10.5.5.5", 1),), 1.0, keep=True, source=B)
    assert not only(Send, actions)
    mark_dead(gossip, B)
    assert ("10.5.5.5", 1) in {send.address for send in only(Send, run(gossip, 1.0, 60.0))}


def test_packets_to_unverified_addresses_carry_no_updates() -> None:
    gossip = with_members(core(), B)
    run(gossip, 0.5, 10.0)
    gossip.update_record(replace(gossip.known.me, build="b1"), 10.0)
    actions = gossip.introduce(tuple((f"10.7.0.{number}", 1) for number in range(8)), 10.0, keep=True)
    assert len(only(Send, actions)) == 8
    assert not any(isinstance(message, Delta) for message in sent(actions))
    assert any(isinstance(message, Delta) for message in sent(run(gossip, 10.0, 10.5), address_of(B)))


def test_an_introduced_address_is_pinged_and_an_answer_starts_a_push_pull() -> None:
    gossip = core()
    actions = gossip.introduce((address_of(B), ("172.17.0.1", 11436)), 1.0)
    pings = [message for message in sent(actions) if isinstance(message, Ping)]
    assert len(only(Send, actions)) == len(pings) == 2
    assert all(ping.node == "" for ping in pings)
    assert any(isinstance(message, Alive) and message.node == ME for message in sent(actions))
    actions = receive(gossip, B, alive(B), Ack(pings[0].sequence, 0), now=1.1)
    assert (Change.JOINED, B) in changes(actions)
    assert only(PushPullWith, actions) == [PushPullWith(B, (address_of(B),))]


def test_an_answer_to_an_unknown_node_includes_the_own_id() -> None:
    answer = sent(receive(core(), B, alive(B), Ping(5, "")))
    assert any(isinstance(message, Ack) and message.sequence == 5 for message in answer)
    assert any(isinstance(message, Alive) and message.node == ME for message in answer)


def test_tcp_is_tried_where_datagrams_are_lost() -> None:
    gossip = core()
    gossip.introduce((address_of(B),), 1.0)
    actions = run(gossip, 1.0, 2.1)
    assert PushPullWith("", (address_of(B),)) in only(PushPullWith, actions)


def test_only_introductions_that_are_kept_are_retried_for_ever() -> None:
    for keep, expected in ((True, True), (False, False)):
        gossip = core()
        gossip.introduce((address_of(B),), 1.0, keep=keep)
        run(gossip, 1.0, 300.0)
        late = [send for send in only(Send, run(gossip, 300.0, 400.0)) if send.address == address_of(B)]
        assert bool(late) is expected


def test_a_seed_is_not_pinged_while_a_live_node_has_its_address() -> None:
    gossip = core()
    gossip.introduce((address_of(B),), 1.0, keep=True)
    with_members(gossip, B)
    actions = run(gossip, 2.0, 60.0)
    assert not any(isinstance(message, Ping) and not message.node for message in sent(actions))


def test_the_number_of_introductions_is_limited() -> None:
    gossip = core()
    for number in range(3000):
        gossip.introduce(((f"10.9.{number >> 8}.{number & 255}", 1),), 1.0, keep=True)
    assert len(gossip._joins._introductions) <= 1024


def test_nothing_is_kept_of_introductions_that_were_given_up() -> None:
    gossip = core()
    for number in range(20):
        gossip.introduce(((f"10.8.0.{number + 1}", 1),), 100.0 * number)
        run(gossip, 100.0 * number, 100.0 * (number + 1))
    assert not gossip._joins._pinged and not gossip._joins._introductions
