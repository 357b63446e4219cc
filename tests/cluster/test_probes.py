"""Probes: pings, relays, lost connections, and a process that was suspended."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Change, Send, TcpPing
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.packet import Ack, Alive, Nack, Ping, PingReq, Suspect, decode
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
    only,
    receive,
    run,
    sent,
    with_members,
)


def test_only_pings_for_this_node_are_answered() -> None:
    gossip = with_members(core(), B)
    assert any(isinstance(message, Ack) for message in sent(receive(gossip, B, Ping(9, ME))))
    assert not any(isinstance(message, Ack) for message in sent(receive(gossip, B, Ping(9, C))))


def test_a_node_is_not_pinged_while_its_packets_arrive() -> None:
    gossip = with_members(core(), B)
    now, pings = 1.0, []
    while now < 10.0:
        if now < 5.0:
            receive(gossip, B, Ping(round(now * 100), ME), now=now)
        pings += [now for message in sent(gossip.tick(now), address_of(B)) if isinstance(message, Ping)]
        now += 0.1
    assert pings
    assert 5.0 < min(pings) < 6.1


def test_silence_leads_to_indirect_pings_then_suspicion_then_death() -> None:
    gossip = with_members(core(), B, C, D, E)
    actions = run(gossip, 1.0, 40.0, silent=(B,))
    asked = [message for message in sent(actions) if isinstance(message, PingReq)]
    assert asked
    assert {ask.node for ask in asked} == {B}
    assert {action.node for action in only(TcpPing, actions)} == {B}
    mine = [change for change, node in changes(actions) if node == B]
    assert mine == [Change.SUSPECTED, Change.DIED]
    assert not gossip.known.alive(B)
    assert gossip.known.alive(C)


def test_a_tcp_pong_counts_as_an_answer() -> None:
    gossip = with_members(core(), B)
    now = 1.0
    while now < 20.0:
        for action in only(TcpPing, gossip.tick(now)):
            gossip.tcp_pong(action.sequence, now)
        now += 0.05
    assert gossip.known.alive(B)
    assert not any(change is Change.SUSPECTED for change, _ in changes(gossip.tick(now)))


def test_a_relayed_ack_counts_as_an_answer() -> None:
    gossip = with_members(core(), B, C, D, E)
    now, suspected = 1.0, False
    while now < 20.0:
        actions = gossip.tick(now)
        for send in only(Send, actions):
            for message in decode(send.data).messages:
                node = next(node for node in (B, C, D, E) if address_of(node) == send.address)
                if isinstance(message, PingReq) or (isinstance(message, Ping) and node != B):
                    actions += receive(gossip, node, Ack(message.sequence, 0), now=now)
        suspected |= any(change is Change.SUSPECTED for change, _ in changes(actions))
        now += 0.05
    assert not suspected


def test_an_ack_from_another_node_is_ignored() -> None:
    gossip = with_members(core(), B, C)
    ping = [m for m in sent(run(gossip, 0.5, 1.5, silent=(B, C))) if isinstance(m, Ping) and m.node][-1]
    other = C if ping.node == B else B
    receive(gossip, other, Ack(ping.sequence, 0), now=1.5)
    assert ping.sequence in gossip._prober._probes


def test_an_indirect_ping_is_answered_with_an_ack_or_a_nack() -> None:
    gossip = with_members(core(), B, C)
    actions = receive(gossip, B, PingReq(31, C, (address_of(C),)), now=1.0)
    ping = next(m for m in sent(actions, address_of(C)) if isinstance(m, Ping) and m.node == C)
    assert Ack(31, 0) in sent(receive(gossip, C, Ack(ping.sequence, 0), now=1.1), address_of(B))
    run(gossip, 1.1, 2.0)
    receive(gossip, B, PingReq(32, C, (address_of(C),)), now=2.0)
    assert Nack(32) in sent(run(gossip, 2.0, 2.6, silent=(B, C)), address_of(B))


def test_missing_nacks_worsen_the_own_health() -> None:
    lonely, helped = with_members(core(), B, C, D), with_members(core(), B, C, D)
    run(lonely, 1.0, 4.0, silent=(B, C, D))
    now = 1.0
    while now < 4.0:
        for send in only(Send, helped.tick(now)):
            for message in decode(send.data).messages:
                node = next(node for node in (B, C, D) if address_of(node) == send.address)
                if isinstance(message, PingReq):
                    receive(helped, node, Nack(message.sequence), now=now)
        now += 0.02
    assert lonely._awareness.score > helped._awareness.score


def test_late_answers_give_a_slow_node_more_time() -> None:
    gossip = with_members(core(), B)
    member = gossip._membership.members[B]
    now, waiting = 1.0, []
    while now < 12.0:
        actions = gossip.tick(now)
        waiting += [(now + 1.2, m.sequence) for m in sent(actions, address_of(B)) if isinstance(m, Ping)]
        for due, sequence in [ack for ack in waiting if ack[0] <= now]:
            waiting.remove((due, sequence))
            receive(gossip, B, alive(B, int(now * 100)), Ack(sequence, 0), now=now)
        now += 0.05
    assert member.late > 0
    assert gossip.known.alive(B)


def test_a_lost_connection_reveals_a_dead_node_within_a_second() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    gossip.link_lost(B, 10.0)
    actions = run(gossip, 10.0, 11.0, silent=(B,))
    assert (Change.DIED, B) in changes(actions)


def test_a_node_whose_connection_timed_out_gets_twice_the_time() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    gossip.link_lost(B, 10.0, silent=True)
    assert (Change.DIED, B) not in changes(run(gossip, 10.0, 11.0, silent=(B,)))
    assert (Change.DIED, B) in changes(run(gossip, 11.0, 11.3, silent=(B,)))


def test_a_slow_node_gets_more_time_after_a_lost_connection() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    gossip._membership.members[B].slowed()
    gossip.link_lost(B, 10.0)
    assert (Change.DIED, B) not in changes(run(gossip, 10.0, 10.9, silent=(B,)))
    assert (Change.DIED, B) in changes(run(gossip, 10.9, 11.2, silent=(B,)))


def test_an_answer_after_a_lost_connection_restores_the_usual_timeout() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    first = gossip.link_lost(B, 10.0, silent=True)
    ping = next(m for m in sent(first, address_of(B)) if isinstance(m, Ping))
    assert (Change.SUSPECTED, B) in changes(run(gossip, 10.0, 10.6, silent=(B,)))
    receive(gossip, B, Ack(ping.sequence, 0), now=10.61)
    assert (Change.DIED, B) not in changes(run(gossip, 10.61, 12.9, silent=(B,)))


def test_a_lost_connection_to_a_live_node_changes_nothing() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    first = gossip.link_lost(B, 10.0)
    ping = next(m for m in sent(first, address_of(B)) if isinstance(m, Ping))
    receive(gossip, B, Ack(ping.sequence, 0), now=10.01)
    assert not changes(run(gossip, 10.01, 12.0))


def test_a_lost_connection_starts_all_kinds_of_probes_at_once() -> None:
    gossip = with_members(core(), C)
    receive(gossip, B, Alive(B, 1, 1, (("10.9.9.9", 1), address_of(B))))
    actions = gossip.link_lost(B, 10.0)
    assert {send.address for send in only(Send, actions)} >= {("10.9.9.9", 1), address_of(B), address_of(C)}
    assert any(isinstance(message, PingReq) for message in sent(actions, address_of(C)))
    assert only(TcpPing, actions)


def test_timers_set_by_the_first_packet_after_a_suspension_are_not_postponed() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 0.5, 10.0)
    late = 40.0
    receive(gossip, B, Suspect(C, 1, B), now=late)
    assert gossip._awareness.score == 1
    # The suspicion is passed on after the usual interval, not 40 s later.
    assert any(
        isinstance(m, Suspect) and m.node == C
        for m in sent(run(gossip, late, late + 2 * LAN.gossip_interval, silent=(C,)))
    )


def test_a_suspended_process_suspects_nobody() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 1.0, 5.0)
    actions = run(gossip, 5000.0, 5030.0)
    assert not any(change in (Change.SUSPECTED, Change.DIED) for change, _ in changes(actions))


def test_a_suspension_extends_the_deadlines_of_suspects() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 1.0, 5.0)
    receive(gossip, C, Suspect(B, 1, C), now=5.0)
    assert not any(change is Change.DIED for change, _ in changes(gossip.tick(60.0)))
    assert gossip.known.alive(B)


def test_a_node_that_answers_only_over_tcp_is_reported_until_a_datagram_arrives() -> None:
    gossip = with_members(core(), B)
    now = 1.0
    while now < 30.0:
        for action in only(TcpPing, gossip.tick(now)):
            gossip.tcp_pong(action.sequence, now)
        now += 0.05
    assert gossip.known.alive(B)
    assert gossip.known.unanswered() == (B,)
    run(gossip, now, now + 3.0)
    assert gossip.known.unanswered() == ()


def test_occasional_datagram_loss_is_not_reported() -> None:
    gossip = with_members(core(), B, C)
    for number in range(10):
        began = 1.0 + 6 * number
        run(gossip, began, began + 3.0, silent=(B,))
        receive(gossip, B, alive(B, 2 + number), now=began + 3.0)
        run(gossip, began + 3.0, began + 6.0)
        assert gossip.known.unanswered() == ()
    assert gossip.known.alive(B)
