"""The gossip core, one call at a time: what comes in, which actions go out."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random
from typing import TypeVar

import pytest

from sollold.cluster import exchange as exchange_module
from sollold.cluster.actions import (
    Action,
    Address,
    Change,
    Event,
    Kept,
    Persist,
    PushPullWith,
    Send,
    TcpPing,
)
from sollold.cluster.gossip import Gossip
from sollold.cluster.packet import (
    Ack,
    Alive,
    Dead,
    Delta,
    Left,
    Message,
    Nack,
    Ping,
    PingReq,
    Suspect,
    compound,
    decode,
    encode,
    head,
)
from sollold.cluster.record import Record
from sollold.cluster.registry import Registry
from sollold.cluster.term import Term
from sollold.cluster.tuning import LAN

T = TypeVar("T")
ME, B, C, D, E = (f"{number:016x}" for number in range(10, 15))
BOOT = 77


def at(node: str) -> Address:
    return (f"10.0.0.{int(node, 16)}", 11436)


def record(node: str) -> Record:
    return Record(node, node, 0, (at(node)[0],), 11435, 11436, "0.1.0")


def core(node: str = ME, *, boot: int = BOOT, kept: Kept | None = None, now: float = 0.0) -> Gossip:
    return Gossip(
        record(node), boot=boot, addresses=(at(node),), kept=kept or Kept(), now=now, random=Random(1)
    )


def alive(node: str, incarnation: int = 1, *, boot: int = 1, where: Address | None = None) -> Alive:
    return Alive(node, boot, incarnation, (where or at(node),))


def says(gossip: Gossip, sender: str, *messages: Message, now: float = 1.0, boot: int = 1) -> list[Action]:
    packet = compound(head(sender, boot), [encode(message) for message in messages])
    return gossip.handle_packet(packet, at(sender), now)


def know(gossip: Gossip, *nodes: str, now: float = 0.5) -> Gossip:
    play(gossip, 0.0, now)
    for node in nodes:
        says(gossip, node, alive(node), now=now)
    return gossip


def bury(gossip: Gossip, node: str, now: float = 1.0) -> None:
    """Hold ``node`` dead: suspected here, and found dead elsewhere."""
    gossip._membership.suspect(node, now)
    says(gossip, E, Dead(node, gossip._membership.members[node].incarnation, E), now=now)
    assert not gossip.alive(node)


def of(kind: type[T], actions: list[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: list[Action], to: Address | None = None) -> list[Message]:
    return [
        message
        for send in of(Send, actions)
        if to is None or send.address == to
        for message in decode(send.data).messages
    ]


def changes(actions: list[Action]) -> list[tuple[Change, str]]:
    return [(event.change, event.node) for event in of(Event, actions) if event.change is not Change.UPDATED]


def play(gossip: Gossip, since: float, until: float, *, silent: tuple[str, ...] = ()) -> list[Action]:
    """Tick until then; every known node but the silent ones answers its pings."""
    done: list[Action] = []
    now = since
    while True:
        now = max(now, gossip.next_wake())
        if now > until:
            return done
        actions = gossip.tick(now)
        for persist in of(Persist, actions):
            actions += gossip.persisted(persist.kept, now)
        done += actions
        for send in of(Send, actions):
            for message in decode(send.data).messages:
                if isinstance(message, Ping) and message.node and message.node not in silent:
                    done += says(gossip, message.node, Ack(message.sequence, 0), now=now)


# Starting


def test_the_first_thing_is_to_write_what_must_survive() -> None:
    actions = core(kept=Kept(Term(3, B), 100, 8)).tick(0.0)
    assert isinstance(actions[0], Persist)
    assert actions[0].kept.term == Term(3, B)
    assert actions[0].kept.version > 101
    assert actions[0].kept.incarnation == 9


def test_a_lone_node_leads_after_its_grace() -> None:
    gossip = core()
    actions = play(gossip, 0.0, LAN.grace + LAN.settle)
    assert gossip.leader() == Term(1, ME)
    assert gossip.me.claim == Term(1, ME)
    kept = [action.kept.term for action in of(Persist, actions)]
    assert Term(1, ME) in kept


def test_a_claim_is_on_disk_before_anybody_hears_of_it() -> None:
    gossip = know(core(), B)
    actions = play(gossip, 0.6, 10.0)
    persisted = next(
        i for i, action in enumerate(actions) if isinstance(action, Persist) and action.kept.term.counter
    )
    told = next(
        i for i, action in enumerate(actions) if isinstance(action, Event) and action.change is Change.LEADER
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
    gossip.update_record(replace(gossip.me, build="b1"), 10.0)
    actions = gossip.introduce(tuple((f"10.7.0.{number}", 1) for number in range(8)), 10.0, keep=True)
    assert len(of(Send, actions)) == 8
    assert not any(isinstance(message, Delta) for message in sent(actions))
    assert any(isinstance(message, Delta) for message in sent(play(gossip, 10.0, 10.5), at(B)))


def test_nothing_waits_for_the_disk_but_the_claim() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    assert persist.kept.term == Term(1, ME)
    assert (gossip.leader(), gossip.me.claim) == (Term(), Term())
    answers = sent(says(gossip, B, alive(B), Ping(9, ME), now=4.0))
    assert any(isinstance(message, Ack) for message in answers)
    gossip.persisted(persist.kept, 5.0)
    assert gossip.leader() == gossip.me.claim == Term(1, ME)


def test_a_claim_is_dropped_if_a_higher_term_came_before_it_was_on_disk() -> None:
    gossip = core()
    persist = unwritten_claim(gossip)
    gossip.observe_term(Term(7, B), 5.0)
    gossip.persisted(persist.kept, 5.1)
    assert gossip.me.claim == Term()
    play(gossip, 5.1, 12.0)
    assert gossip.leader() == Term(8, ME)


# Introductions


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
    assert len(gossip._introductions._all) <= 1024


# Probing


def test_a_ping_is_answered_and_one_for_another_is_not() -> None:
    gossip = know(core(), B)
    assert any(isinstance(message, Ack) for message in sent(says(gossip, B, Ping(9, ME))))
    assert not any(isinstance(message, Ack) for message in sent(says(gossip, B, Ping(9, C))))


def test_silence_leads_to_indirect_pings_then_suspicion_then_death() -> None:
    gossip = know(core(), B, C, D, E)
    actions = play(gossip, 1.0, 40.0, silent=(B,))
    asked = [message for message in sent(actions) if isinstance(message, PingReq)]
    assert asked
    assert {ask.node for ask in asked} == {B}
    assert {action.node for action in of(TcpPing, actions)} == {B}
    mine = [change for change, node in changes(actions) if node == B]
    assert mine == [Change.SUSPECTED, Change.DIED]
    assert not gossip.alive(B)
    assert gossip.alive(C)


def test_an_answer_over_tcp_is_one() -> None:
    gossip = know(core(), B)
    now = 1.0
    while now < 20.0:
        for action in of(TcpPing, gossip.tick(now)):
            gossip.tcp_pong(action.sequence, now)
        now += 0.05
    assert gossip.alive(B)
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
    assert gossip.alive(B)


# Broken connections


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


# Standing still


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


# Accusations and refutations


def test_an_accusation_is_refuted_to_the_accuser_at_once() -> None:
    gossip = know(core(), B)
    actions = says(gossip, B, Suspect(ME, 5, B))
    refutation = [m for m in sent(actions, at(B)) if isinstance(m, Alive) and m.node == ME]
    assert refutation
    assert refutation[0].incarnation == 6
    assert gossip.health == 1


def test_an_old_accusation_is_not_answered() -> None:
    gossip = know(core(kept=Kept(incarnation=9)), B)
    actions = says(gossip, B, Suspect(ME, 5, B), Dead(ME, 9, B))
    assert not any(isinstance(m, Alive) and m.incarnation > 10 for m in sent(actions))


def test_a_suspect_that_refutes_lives() -> None:
    gossip = know(core(), B, C)
    assert (Change.SUSPECTED, B) in changes(says(gossip, C, Suspect(B, 1, C)))
    assert gossip.alive(B)
    assert (Change.CLEARED, B) in changes(says(gossip, C, alive(B, 2)))


def test_old_gossip_does_not_bring_the_dead_back() -> None:
    gossip = know(core(), B, C)
    bury(gossip, B)
    play(gossip, 1.0, 3.5, silent=(B,))
    assert not changes(says(gossip, C, alive(B, 1), now=3.5))
    assert not gossip.alive(B)


def test_the_word_of_one_that_was_cut_off_kills_nobody_who_answers() -> None:
    """It holds all others dead, and says so when it is back."""
    for answers in (True, False):
        gossip = know(core(), B, C, D, E)
        now = 1.0
        told = says(gossip, E, Dead(B, 1, E), now=now)
        while now < 3.5:
            actions = gossip.tick(now)
            for send in of(Send, actions):
                for message in decode(send.data).messages:
                    if isinstance(message, Suspect) and message.node == B and answers:
                        actions += says(gossip, B, alive(B, 2), now=now)
            told += actions
            now += 0.05
        assert (Change.SUSPECTED, B) in changes(told)
        assert gossip.alive(B) is answers


def test_old_accusations_do_not_touch_the_living() -> None:
    gossip = know(core(), C)
    says(gossip, B, alive(B, 5))
    assert not changes(says(gossip, C, Suspect(B, 4, C), Dead(B, 4, C), Left(B, 4)))
    assert gossip.alive(B)


def test_the_dead_that_speaks_is_told_and_comes_back_by_refuting() -> None:
    gossip = know(core(), B, C)
    bury(gossip, B)
    play(gossip, 1.0, 3.5, silent=(B,))
    assert Dead(B, 1, B) in sent(says(gossip, B, Ping(1, ME), now=3.5), at(B))
    assert (Change.JOINED, B) in changes(says(gossip, B, alive(B, 2), now=3.5))


def test_a_restarted_node_is_told_what_is_held_of_it_and_comes_back_at_once() -> None:
    gossip = core()
    says(gossip, B, alive(B, 7, boot=1))
    told = sent(says(gossip, B, alive(B, 1, boot=2), boot=2), at(B))
    assert alive(B, 7, boot=1) in told
    restarted = core(B, boot=2)
    says(restarted, ME, alive(B, 7, boot=1))
    assert restarted._membership.incarnation == 8
    assert (Change.RESTARTED, B) in changes(says(gossip, B, alive(B, 8, boot=2), boot=2))


def test_a_clone_is_told_of_and_not_fought_without_end() -> None:
    gossip = know(core(), B)
    told = []
    for turn in range(50):
        incarnation = gossip._membership.incarnation + 1
        told += changes(says(gossip, B, Alive(ME, 99, incarnation, ()), now=1.0 + turn / 1000))
    assert (Change.CLONED, ME) in told
    assert gossip._membership.incarnation < 60


def test_two_clones_that_know_nobody_else_tell_of_each_other_once() -> None:
    gossip, clone = core(boot=1), core(boot=2)

    def hears(core: Gossip, actions: list[Action], now: float) -> list[Action]:
        return [did for send in of(Send, actions) for did in core.handle_packet(send.data, at(C), now)]

    hello = gossip.introduce((at(B),), 0.1)
    assert of(Send, hello)
    answer = hears(clone, hello, 0.1)
    assert changes(answer) == [(Change.CLONED, ME)]
    back = hears(gossip, answer, 0.2)
    assert changes(back) == [(Change.CLONED, ME)]
    assert not hears(clone, back, 0.3), "or the two would go on for ever"
    assert not hears(gossip, hello, 70.0), "our own word that came back to us is no clone's"
    assert changes(hears(clone, hello, 70.0)) == [(Change.CLONED, ME)]


def test_a_name_may_come_back_with_another_address() -> None:
    gossip = know(core(), B)
    new = ("10.7.7.7", 11436)
    assert (Change.MOVED, B) in changes(says(gossip, C, alive(B, 2, where=new)))
    assert gossip.addresses(B)[0] == new


def test_the_address_that_a_peer_reached_us_from_is_preferred() -> None:
    gossip = core()
    says(gossip, B, Alive(B, 1, 1, (("172.17.0.1", 11436), at(B))))
    assert gossip.addresses(B)[0] == at(B)


def test_nonsense_is_not_taken_in() -> None:
    gossip = core()
    says(gossip, C, Alive("not a node's id!", 1, 1, ()), Alive(B, 1, 1, (("example.org", 1),)))
    assert not gossip.alive(B)
    assert gossip.contacts() == ()


def test_a_claim_that_no_election_can_go_above_is_not_taken_in() -> None:
    gossip = know(core(), B)
    forger = Registry(replace(record(B), claim=Term(2**64 - 1, B)), 1, 0)
    says(gossip, B, decode(compound(head(B, 1), [forger.delta(1300, 1300)])).messages[0])
    assert gossip.rejected == 1
    bury(gossip, B)
    play(gossip, 1.0, 20.0, silent=(B,))
    assert gossip.leader() == Term(1, ME)


def test_invented_names_fill_no_memory() -> None:
    gossip = know(core(), B)
    for number in range(6000):
        says(gossip, B, alive(f"{number + 100:016x}"))
    assert len(gossip.contacts()) <= 4096
    assert gossip.alive(B)


def test_a_record_of_nobody_is_not_kept() -> None:
    gossip, stranger = know(core(), B), core(D, boot=3)
    exchange(stranger, core(E, boot=4), 0.5)
    news = next(m for m in sent(play(stranger, 0.5, 1.0)) if isinstance(m, Delta) and m.node == D)
    says(gossip, B, news)
    assert gossip.record(D) is None
    says(gossip, B, news, alive(D, boot=3))
    assert gossip.record(D) == stranger.me


def test_a_name_is_not_looked_up_for_another() -> None:
    gossip = know(core(), B)
    actions = says(gossip, B, PingReq(1, C, (("example.org", 80), at(C))))
    assert {send.address for send in of(Send, actions)} <= {at(B), at(C)}


# Leaving


def test_a_goodbye_is_said_and_not_refuted() -> None:
    gossip = know(core(), B, C)
    assert any(isinstance(m, Left) and m.node == ME for m in sent(gossip.leave(5.0)))
    assert not any(isinstance(m, Alive) and m.node == ME for m in sent(says(gossip, B, Left(ME, 1))))


def test_who_said_goodbye_is_gone_without_suspicion() -> None:
    gossip = know(core(), B, C)
    assert changes(says(gossip, B, Left(B, 1))) == [(Change.LEFT, B)]
    assert not gossip.alive(B)


# Time


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
    assert gossip.alive(B)


# Records and push-pull


def exchange(one: Gossip, other: Gossip, now: float) -> list[Action]:
    """A push-pull of two; the actions of both."""
    done: list[Action] = []
    body, sides = one.push_pull_open(), (other, one)
    while body:
        source = at(sides[1].me.node)
        body, actions = sides[0].push_pull(body, source, now)
        done += actions
        sides = (sides[1], sides[0])
    return done


def test_a_push_pull_makes_both_know_all() -> None:
    one, other = know(core(ME), C), know(core(B, boot=3), D)
    one.update_record(replace(one.me, models="mine"), 1.0)
    other.update_record(replace(other.me, models="theirs"), 1.0)
    exchange(one, other, 2.0)
    assert one.record(B) == other.me
    assert other.record(ME) == one.me
    for gossip in (one, other):
        assert all(gossip.alive(node) for node in (ME, B, C, D))


@pytest.mark.parametrize("opens", [True, False])
def test_what_does_not_fit_one_body_comes_with_a_later_exchange(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(exchange_module, "_ROOM", 9000)
    one, other = core(ME), core(B, boot=3)
    nodes = [f"{number:016x}" for number in range(100, 109)]
    for node in nodes:
        writer = core(node, boot=4)
        writer.update_record(replace(writer.me, models="m" * 2000), 1.0)
        exchange(one, writer, 1.0)
    sides = (one, other) if opens else (other, one)
    rounds = 0
    while not all(other.record(node) == one.record(node) for node in nodes):
        rounds += 1
        body, turn, largest = sides[0].push_pull_open(), 1, 0
        while body:
            largest = max(largest, len(body))
            body, _ = sides[turn].push_pull(body, None, 2.0)
            turn = 1 - turn
        assert largest < 12_000
    assert rounds == 3


def test_equals_exchange_little() -> None:
    one, other = core(ME), core(B, boot=3)
    one.update_record(replace(one.me, models="m" * 5000), 1.0)
    exchange(one, other, 2.0)
    answer, _ = other.push_pull(one.push_pull_open(), at(ME), 3.0)
    assert len(answer) < 500


def test_the_dead_of_a_push_pull_are_suspects() -> None:
    one, other = know(core(ME), C), know(core(B, boot=3), C)
    bury(other, C)
    actions = exchange(one, other, 2.0)
    assert (Change.SUSPECTED, C) in changes(actions)
    assert one.alive(C)


def test_a_restart_without_disk_ends_above_the_old_record() -> None:
    before, peer = core(ME, kept=Kept(version=900)), core(B, boot=3)
    exchange(before, peer, 1.0)
    after = core(ME, boot=BOOT + 1)
    after.update_record(replace(after.me, models="new"), 2.0)
    exchange(after, peer, 3.0)
    exchange(after, peer, 4.0)
    held = peer.record(ME)
    assert held is not None
    assert held.models == "new"
    assert held.version > before.me.version


def test_a_record_that_came_over_tcp_goes_on_as_news() -> None:
    one, other = know(core(ME), C), core(B, boot=3)
    exchange(one, other, 2.0)
    deltas = [m for m in sent(play(one, 2.0, 3.0)) if type(m).__name__ == "Delta" and m.node == B]
    assert deltas


def test_a_peer_that_knows_something_else_is_asked() -> None:
    gossip = know(core(), B)
    asked: list[Action] = []
    now = 0.5
    for _ in range(4):
        pings: list[Ping] = []
        while not pings:
            now = max(now, gossip.next_wake())
            pings = [message for message in sent(gossip.tick(now)) if isinstance(message, Ping)]
        asked += says(gossip, B, Ack(pings[0].sequence, 12345), now=now)
    assert PushPullWith(B, (at(B),)) in asked


def test_a_failed_push_pull_is_tried_with_another() -> None:
    gossip = know(core(), B, C)
    play(gossip, 1.0, 2.0)
    actions = gossip.push_pull_done(B, False, 2.0) + play(gossip, 2.0, 3.0)
    assert PushPullWith(C, (at(C),)) in actions


def test_the_version_rises_with_each_change_alone() -> None:
    gossip = core()
    version = gossip.me.version
    gossip.update_record(replace(gossip.me, build="b1"), 1.0)
    gossip.update_record(replace(gossip.me, build="b1", version=0, claim=Term(9, B)), 1.0)
    assert gossip.me.version == version + 1
    assert gossip.me.claim == Term()


# Leaders


def test_a_term_seen_elsewhere_is_never_claimed_below() -> None:
    gossip = core()
    actions = gossip.observe_term(Term(40, B), 1.0)
    assert [action.kept.term for action in of(Persist, actions)][-1] == Term(40, B)
    play(gossip, 1.0, 10.0)
    assert gossip.leader() == Term(41, ME)


def test_a_leader_steps_down_when_it_hears_of_a_higher_term() -> None:
    one, other = core(ME), core(B, boot=3, kept=Kept(Term(8, "")))
    play(one, 0.0, 5.0)
    play(other, 0.0, 5.0)
    assert (one.leader(), other.leader()) == (Term(1, ME), Term(9, B))
    exchange(one, other, 6.0)
    assert one.leader() == other.leader() == Term(9, B)


def test_the_leader_that_died_is_followed_within_two_seconds() -> None:
    gossip, leader = core(C), core(ME, boot=3, kept=Kept(Term(5, "")))
    play(leader, 0.0, 5.0)
    play(gossip, 0.0, 5.0)
    exchange(gossip, leader, 5.0)
    assert gossip.leader() == Term(6, ME)
    bury(know(gossip, B, now=6.0), ME, now=6.0)
    assert gossip.leader() == Term()
    play(gossip, 6.0, 6.0 + LAN.settle + LAN.patience + 0.01)
    assert gossip.leader() == Term(7, C)
