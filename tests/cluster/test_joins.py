"""How a node gets to know its first peers: introductions are tried until one answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from sollold.cluster.gossip.actions import Change, PushPullWith, Send
from sollold.cluster.gossip.packet import Ack, Alive, Delta, Ping
from tests.cluster.gossip_core import ME, B, C, alive, at, bury, changes, core, know, of, play, says, sent


def test_a_seed_whose_addresses_rotate_is_one_introduction() -> None:
    gossip = core()
    places = [(f"10.9.0.{number}", 11436) for number in range(1, 8)]
    for turned in permutations(places):
        gossip.introduce(turned, 1.0, keep=True, source="pool.example:11436")
        gossip.introduce(turned, 1.0, keep=True)
    assert {send.address for send in of(Send, gossip.introduce((at(B),), 1.0))} == {at(B)}


def test_what_a_seed_says_now_replaces_what_it_said() -> None:
    gossip = core()
    gossip.introduce((at(B),), 1.0, keep=True, source="one.example:1")
    actions = gossip.introduce((at(C),), 2.0, keep=True, source="one.example:1")
    assert {send.address for send in of(Send, actions)} == {at(C)}
    later = play(gossip, 2.0, 120.0)
    assert at(C) in {send.address for send in of(Send, later)}
    assert at(B) not in {send.address for send in of(Send, later)}


def test_who_lives_elsewhere_is_not_looked_for_where_it_was() -> None:
    gossip = know(core(), B)
    actions = gossip.introduce((("10.5.5.5", 1),), 1.0, keep=True, source=B)
    assert not of(Send, actions)
    bury(gossip, B)
    assert ("10.5.5.5", 1) in {send.address for send in of(Send, play(gossip, 1.0, 60.0))}


def test_no_news_are_spent_on_addresses_where_perhaps_nobody_is() -> None:
    gossip = know(core(), B)
    play(gossip, 0.5, 10.0)
    gossip.update_record(replace(gossip.known.me, build="b1"), 10.0)
    actions = gossip.introduce(tuple((f"10.7.0.{number}", 1) for number in range(8)), 10.0, keep=True)
    assert len(of(Send, actions)) == 8
    assert not any(isinstance(message, Delta) for message in sent(actions))
    assert any(isinstance(message, Delta) for message in sent(play(gossip, 10.0, 10.5), at(B)))


def test_an_introduced_address_is_pinged_and_who_answers_is_asked_for_all() -> None:
    gossip = core()
    actions = gossip.introduce((at(B), ("172.17.0.1", 11436)), 1.0)
    pings = [message for message in sent(actions) if isinstance(message, Ping)]
    assert len(of(Send, actions)) == len(pings) == 2
    assert all(ping.node == "" for ping in pings)
    assert any(isinstance(message, Alive) and message.node == ME for message in sent(actions))
    actions = says(gossip, B, alive(B), Ack(pings[0].sequence, 0), now=1.1)
    assert (Change.JOINED, B) in changes(actions)
    assert of(PushPullWith, actions) == [PushPullWith(B, (at(B),))]


def test_a_stranger_is_told_who_answers() -> None:
    answer = sent(says(core(), B, alive(B), Ping(5, "")))
    assert any(isinstance(message, Ack) and message.sequence == 5 for message in answer)
    assert any(isinstance(message, Alive) and message.node == ME for message in answer)


def test_where_datagrams_do_not_pass_tcp_is_tried() -> None:
    gossip = core()
    gossip.introduce((at(B),), 1.0)
    actions = play(gossip, 1.0, 2.1)
    assert PushPullWith("", (at(B),)) in of(PushPullWith, actions)


def test_a_seed_is_tried_for_ever_and_a_passing_introduction_is_not() -> None:
    for keep, expected in ((True, True), (False, False)):
        gossip = core()
        gossip.introduce((at(B),), 1.0, keep=keep)
        play(gossip, 1.0, 300.0)
        late = [send for send in of(Send, play(gossip, 300.0, 400.0)) if send.address == at(B)]
        assert bool(late) is expected


def test_a_seed_rests_while_somebody_lives_there() -> None:
    gossip = core()
    gossip.introduce((at(B),), 1.0, keep=True)
    know(gossip, B)
    actions = play(gossip, 2.0, 60.0)
    assert not any(isinstance(message, Ping) and not message.node for message in sent(actions))


def test_introductions_are_bounded() -> None:
    gossip = core()
    for number in range(3000):
        gossip.introduce(((f"10.9.{number >> 8}.{number & 255}", 1),), 1.0, keep=True)
    assert len(gossip._joins._all) <= 1024
