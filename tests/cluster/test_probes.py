"""Probes: pings, relays, broken connections, and a process that stood still."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Change, Send, TcpPing
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.packet import Ack, Alive, Nack, Ping, PingReq, Suspect, decode
from tests.cluster.gossip_core import ME, B, C, D, E, alive, at, changes, core, know, of, play, says, sent


def test_a_ping_is_answered_and_one_for_another_is_not() -> None:
    gossip = know(core(), B)
    assert any(isinstance(message, Ack) for message in sent(says(gossip, B, Ping(9, ME))))
    assert not any(isinstance(message, Ack) for message in sent(says(gossip, B, Ping(9, C))))


def test_who_was_just_heard_is_not_pinged_until_silent_for_a_turn() -> None:
    gossip = know(core(), B)
    now, pings = 1.0, []
    while now < 10.0:
        if now < 5.0:
            says(gossip, B, Ping(round(now * 100), ME), now=now)
        pings += [now for message in sent(gossip.tick(now), at(B)) if isinstance(message, Ping)]
        now += 0.1
    assert pings
    assert 5.0 < min(pings) < 6.1


def test_silence_leads_to_indirect_pings_then_suspicion_then_death() -> None:
    gossip = know(core(), B, C, D, E)
    actions = play(gossip, 1.0, 40.0, silent=(B,))
    asked = [message for message in sent(actions) if isinstance(message, PingReq)]
    assert asked
    assert {ask.node for ask in asked} == {B}
    assert {action.node for action in of(TcpPing, actions)} == {B}
    mine = [change for change, node in changes(actions) if node == B]
    assert mine == [Change.SUSPECTED, Change.DIED]
    assert not gossip.known.alive(B)
    assert gossip.known.alive(C)


def test_an_answer_over_tcp_is_one() -> None:
    gossip = know(core(), B)
    now = 1.0
    while now < 20.0:
        for action in of(TcpPing, gossip.tick(now)):
            gossip.tcp_pong(action.sequence, now)
        now += 0.05
    assert gossip.known.alive(B)
    assert not any(change is Change.SUSPECTED for change, _ in changes(gossip.tick(now)))


def test_an_answer_by_a_relay_is_one() -> None:
    gossip = know(core(), B, C, D, E)
    now, suspected = 1.0, False
    while now < 20.0:
        actions = gossip.tick(now)
        for send in of(Send, actions):
            for message in decode(send.data).messages:
                node = next(node for node in (B, C, D, E) if at(node) == send.address)
                if isinstance(message, PingReq) or (isinstance(message, Ping) and node != B):
                    actions += says(gossip, node, Ack(message.sequence, 0), now=now)
        suspected |= any(change is Change.SUSPECTED for change, _ in changes(actions))
        now += 0.05
    assert not suspected


def test_an_answer_of_somebody_else_is_none() -> None:
    gossip = know(core(), B, C)
    ping = [m for m in sent(play(gossip, 0.5, 1.5, silent=(B, C))) if isinstance(m, Ping) and m.node][-1]
    other = C if ping.node == B else B
    says(gossip, other, Ack(ping.sequence, 0), now=1.5)
    assert ping.sequence in gossip._prober._probes


def test_pinging_for_another_ends_in_its_ack_or_a_nack() -> None:
    gossip = know(core(), B, C)
    actions = says(gossip, B, PingReq(31, C, (at(C),)), now=1.0)
    ping = next(m for m in sent(actions, at(C)) if isinstance(m, Ping) and m.node == C)
    assert Ack(31, 0) in sent(says(gossip, C, Ack(ping.sequence, 0), now=1.1), at(B))
    play(gossip, 1.1, 2.0)
    says(gossip, B, PingReq(32, C, (at(C),)), now=2.0)
    assert Nack(32) in sent(play(gossip, 2.0, 2.6, silent=(B, C)), at(B))


def test_missing_nacks_blame_oneself() -> None:
    lonely, helped = know(core(), B, C, D), know(core(), B, C, D)
    play(lonely, 1.0, 4.0, silent=(B, C, D))
    now = 1.0
    while now < 4.0:
        for send in of(Send, helped.tick(now)):
            for message in decode(send.data).messages:
                node = next(node for node in (B, C, D) if at(node) == send.address)
                if isinstance(message, PingReq):
                    says(helped, node, Nack(message.sequence), now=now)
        now += 0.02
    assert lonely.health > helped.health


def test_a_late_answer_gains_a_slow_node_more_time() -> None:
    gossip = know(core(), B)
    member = gossip._membership.members[B]
    now, waiting = 1.0, []
    while now < 12.0:
        actions = gossip.tick(now)
        waiting += [(now + 1.2, m.sequence) for m in sent(actions, at(B)) if isinstance(m, Ping)]
        for due, sequence in [one for one in waiting if one[0] <= now]:
            waiting.remove((due, sequence))
            says(gossip, B, alive(B, int(now * 100)), Ack(sequence, 0), now=now)
        now += 0.05
    assert member.late > 0
    assert gossip.known.alive(B)


def test_a_broken_connection_to_the_dead_is_known_within_a_second() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    gossip.link_lost(B, 10.0)
    actions = play(gossip, 10.0, 11.0, silent=(B,))
    assert (Change.DIED, B) in changes(actions)


def test_a_connection_that_fell_silent_gets_twice_the_time() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    gossip.link_lost(B, 10.0, silent=True)
    assert (Change.DIED, B) not in changes(play(gossip, 10.0, 11.0, silent=(B,)))
    assert (Change.DIED, B) in changes(play(gossip, 11.0, 11.3, silent=(B,)))


def test_a_node_known_to_be_late_gets_more_time_after_a_broken_connection() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    gossip._membership.members[B].slowed()
    gossip.link_lost(B, 10.0)
    assert (Change.DIED, B) not in changes(play(gossip, 10.0, 10.9, silent=(B,)))
    assert (Change.DIED, B) in changes(play(gossip, 10.9, 11.2, silent=(B,)))


def test_who_answers_after_its_connection_broke_is_suspected_no_faster_than_others() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    first = gossip.link_lost(B, 10.0, silent=True)
    ping = next(m for m in sent(first, at(B)) if isinstance(m, Ping))
    assert (Change.SUSPECTED, B) in changes(play(gossip, 10.0, 10.6, silent=(B,)))
    says(gossip, B, Ack(ping.sequence, 0), now=10.61)
    assert (Change.DIED, B) not in changes(play(gossip, 10.61, 12.9, silent=(B,)))


def test_a_broken_connection_to_the_living_is_harmless() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    first = gossip.link_lost(B, 10.0)
    ping = next(m for m in sent(first, at(B)) if isinstance(m, Ping))
    says(gossip, B, Ack(ping.sequence, 0), now=10.01)
    assert not changes(play(gossip, 10.01, 12.0))


def test_a_broken_connection_is_looked_into_on_all_ways_at_once() -> None:
    gossip = know(core(), C)
    says(gossip, B, Alive(B, 1, 1, (("10.9.9.9", 1), at(B))))
    actions = gossip.link_lost(B, 10.0)
    assert {send.address for send in of(Send, actions)} >= {("10.9.9.9", 1), at(B), at(C)}
    assert any(isinstance(message, PingReq) for message in sent(actions, at(C)))
    assert of(TcpPing, actions)


def test_what_is_set_by_the_first_packet_after_a_stop_is_not_moved_with_the_rest() -> None:
    gossip = know(core(), B, C)
    play(gossip, 0.5, 10.0)
    late = 40.0
    says(gossip, B, Suspect(C, 1, B), now=late)
    assert gossip.health == 1
    # What it heard goes on after the usual pause, not after another forty seconds.
    assert any(
        isinstance(m, Suspect) and m.node == C
        for m in sent(play(gossip, late, late + 2 * LAN.gossip_interval, silent=(C,)))
    )


def test_a_process_that_stood_still_accuses_nobody() -> None:
    gossip = know(core(), B, C)
    play(gossip, 1.0, 5.0)
    actions = play(gossip, 5000.0, 5030.0)
    assert not any(change in (Change.SUSPECTED, Change.DIED) for change, _ in changes(actions))


def test_suspects_get_the_time_back_that_the_process_stood_still() -> None:
    gossip = know(core(), B, C)
    play(gossip, 1.0, 5.0)
    says(gossip, C, Suspect(B, 1, C), now=5.0)
    assert not any(change is Change.DIED for change, _ in changes(gossip.tick(60.0)))
    assert gossip.known.alive(B)


def test_who_answers_over_tcp_alone_is_told_of_until_a_datagram_comes() -> None:
    gossip = know(core(), B)
    now = 1.0
    while now < 30.0:
        for action in of(TcpPing, gossip.tick(now)):
            gossip.tcp_pong(action.sequence, now)
        now += 0.05
    assert gossip.known.alive(B)
    assert gossip.known.unanswered() == (B,)
    play(gossip, now, now + 3.0)
    assert gossip.known.unanswered() == ()


def test_datagrams_of_which_some_get_lost_are_not_told_of() -> None:
    gossip = know(core(), B, C)
    for number in range(10):
        began = 1.0 + 6 * number
        play(gossip, began, began + 3.0, silent=(B,))
        says(gossip, B, alive(B, 2 + number), now=began + 3.0)
        play(gossip, began + 3.0, began + 6.0)
        assert gossip.known.unanswered() == ()
    assert gossip.known.alive(B)
