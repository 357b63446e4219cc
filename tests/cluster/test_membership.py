"""Who is alive, suspected, dead or gone: accusations, refutations and goodbyes."""

from __future__ import annotations

from dataclasses import replace

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
    alive,
    at,
    bury,
    changes,
    core,
    exchange,
    know,
    of,
    play,
    record,
    registry,
    says,
    sent,
)


def test_an_accusation_is_refuted_to_the_accuser_at_once() -> None:
    gossip = know(core(), B)
    actions = says(gossip, B, Suspect(ME, 5, B))
    refutation = [m for m in sent(actions, at(B)) if isinstance(m, Alive) and m.node == ME]
    assert refutation
    assert refutation[0].incarnation == 6
    assert gossip.health == 1


def test_an_old_accusation_is_not_answered() -> None:
    gossip = know(core(kept=PersistedState(incarnation=9)), B)
    actions = says(gossip, B, Suspect(ME, 5, B), Dead(ME, 9, B))
    assert not any(isinstance(m, Alive) and m.incarnation > 10 for m in sent(actions))


def test_a_suspect_that_refutes_lives() -> None:
    gossip = know(core(), B, C)
    assert (Change.SUSPECTED, B) in changes(says(gossip, C, Suspect(B, 1, C)))
    assert gossip.known.alive(B)
    assert (Change.CLEARED, B) in changes(says(gossip, C, alive(B, 2)))


def test_old_gossip_does_not_bring_the_dead_back() -> None:
    gossip = know(core(), B, C)
    bury(gossip, B)
    play(gossip, 1.0, 3.5, silent=(B,))
    assert not changes(says(gossip, C, alive(B, 1), now=3.5))
    assert not gossip.known.alive(B)


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
        assert gossip.known.alive(B) is answers


def test_old_accusations_do_not_touch_the_living() -> None:
    gossip = know(core(), C)
    says(gossip, B, alive(B, 5))
    assert not changes(says(gossip, C, Suspect(B, 4, C), Dead(B, 4, C), Left(B, 4)))
    assert gossip.known.alive(B)


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
    assert restarted._membership.own.incarnation == 8
    assert (Change.RESTARTED, B) in changes(says(gossip, B, alive(B, 8, boot=2), boot=2))


def test_a_clone_is_told_of_and_not_fought_without_end() -> None:
    gossip = know(core(), B)
    told = []
    for turn in range(50):
        incarnation = gossip._membership.own.incarnation + 1
        told += changes(says(gossip, B, Alive(ME, 99, incarnation, ()), now=1.0 + turn / 1000))
    assert told.count((Change.CLONED, ME)) == 1
    assert gossip._membership.own.incarnation < 60
    for turn in range(600):  # ten minutes, with a word of the clone each second
        incarnation = gossip._membership.own.incarnation + 1
        told += changes(says(gossip, B, Alive(ME, 99, incarnation, ()), now=2.0 + turn))
    assert told.count((Change.CLONED, ME)) <= 11, "the log is not filled with it"
    assert gossip._membership.own.incarnation < 150


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
    assert gossip.known.addresses(B)[0] == new
    assert gossip.known.lost_hosts(B) == {at(B)[0]}
    both = Alive(B, 1, 3, (new, ("10.7.7.8", 11436)))
    assert (Change.MOVED, B) in changes(says(gossip, C, both))
    assert not gossip.known.lost_hosts(B), "one more address is no loss"


def test_the_address_that_a_peer_reached_us_from_is_preferred() -> None:
    gossip = core()
    says(gossip, B, Alive(B, 1, 1, (("172.17.0.1", 11436), at(B))))
    assert gossip.known.addresses(B)[0] == at(B)


def test_nonsense_is_not_taken_in() -> None:
    gossip = core()
    says(gossip, C, Alive("not a node's id!", 1, 1, ()), Alive(B, 1, 1, (("example.org", 1),)))
    assert not gossip.known.alive(B)
    assert gossip.known.contacts() == ()


def test_a_claim_that_no_election_can_go_above_is_not_taken_in() -> None:
    gossip = know(core(), B)
    forger = registry(replace(record(B), claim=Term(2**64 - 1, B)))
    says(gossip, B, decode(compound(head(B, 1), [forger.delta(1300, 1300)])).messages[0])
    assert gossip.rejected == 1
    bury(gossip, B)
    play(gossip, 1.0, 20.0, silent=(B,))
    assert gossip.known.leader() == Term(1, ME)


def test_invented_names_fill_no_memory() -> None:
    gossip = know(core(), B)
    for number in range(6000):
        says(gossip, B, alive(f"{number + 100:016x}"))
    assert len(gossip.known.contacts()) <= 4096
    assert gossip.known.alive(B)


def test_a_record_of_nobody_is_not_kept() -> None:
    gossip, stranger = know(core(), B), core(D, boot=3)
    exchange(stranger, core(E, boot=4), 0.5)
    news = next(m for m in sent(play(stranger, 0.5, 1.0)) if isinstance(m, Delta) and m.node == D)
    says(gossip, B, news)
    assert gossip.known.record(D) is None
    says(gossip, B, news, alive(D, boot=3))
    assert gossip.known.record(D) == stranger.known.me


def test_a_name_is_not_looked_up_for_another() -> None:
    gossip = know(core(), B)
    actions = says(gossip, B, PingReq(1, C, (("example.org", 80), at(C))))
    assert {send.address for send in of(Send, actions)} <= {at(B), at(C)}


def test_a_goodbye_is_said_and_not_refuted() -> None:
    gossip = know(core(), B, C)
    assert any(isinstance(m, Left) and m.node == ME for m in sent(gossip.leave(5.0)))
    assert not any(isinstance(m, Alive) and m.node == ME for m in sent(says(gossip, B, Left(ME, 1))))


def test_who_said_goodbye_is_gone_without_suspicion() -> None:
    gossip = know(core(), B, C)
    assert changes(says(gossip, B, Left(B, 1))) == [(Change.LEFT, B)]
    assert not gossip.known.alive(B)
