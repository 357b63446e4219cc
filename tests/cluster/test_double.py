"""A state folder that was copied to another machine: both live with one node id."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Change, Persist
from sollold.cluster.gossip.double import Double, boot_number
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Alive, Dead, Ping
from sollold.cluster.gossip.term import Term
from tests.cluster.gossip_core import ME, B, C, at, changes, core, know, of, play, says

FIRST, COPY = ("10.0.0.1", 11436), ("10.0.0.2", 11436)


def said(boot: int, incarnation: int) -> Alive:
    return Alive(B, boot, incarnation, (FIRST if boot == 5 else COPY,))


def test_processes_that_start_later_have_greater_numbers() -> None:
    numbers = [boot_number(at, chance) for at in (0.0, 1.8e9, 1.8e9 + 2) for chance in (0, 2**62 - 1)]
    assert [number // 2**32 for number in numbers] == sorted(number // 2**32 for number in numbers)
    assert all(0 < number < 2**63 and number % 2 for number in numbers)
    assert numbers[3] < numbers[4]


def test_of_two_that_live_the_first_is_kept_and_the_change_is_told_once() -> None:
    for first in (5, 9):
        gossip = know(core(), C)
        told = []
        for incarnation in range(1, 40):
            boot = first if incarnation % 2 else 14 - first
            told += changes(says(gossip, C, said(boot, incarnation), now=1.0 + incarnation / 100))
        assert told.count((Change.DOUBLED, B)) == 1
        assert told.count((Change.RESTARTED, B)) <= 5
        assert gossip.known.boot(B) == 5
        assert gossip.known.doubles(2.0) == (Double(B, FIRST[0], COPY[0]),)
        assert gossip.known.barred(B, 9) and not gossip.known.barred(B, 5)


def test_one_word_of_an_earlier_process_that_comes_late_is_no_double() -> None:
    gossip = know(core(), C)
    told = changes(says(gossip, C, said(5, 1), said(9, 2), said(5, 3), said(9, 4)))
    told += changes(says(gossip, C, said(12, 5), said(9, 6), said(12, 7)))
    assert (Change.DOUBLED, B) not in told
    assert gossip.known.boot(B) == 12 and not gossip.known.doubles(2.0)


def test_a_datagram_of_a_process_that_was_followed_long_ago_shows_that_it_lives() -> None:
    gossip = know(core(), C)
    says(gossip, C, said(5, 1), said(9, 2))
    assert (Change.DOUBLED, B) not in changes(says(gossip, B, Ping(1, ME), now=2.0, boot=5)), "it may be late"
    assert (Change.DOUBLED, B) in changes(says(gossip, B, Ping(2, ME), now=9.0, boot=5))
    says(gossip, B, said(5, 3), now=9.1, boot=5)
    assert gossip.known.boot(B) == 5 and gossip.known.barred(B, 9)


def test_the_other_is_listened_to_when_the_first_is_gone() -> None:
    gossip = know(core(), C)
    for incarnation in range(1, 9):
        says(gossip, C, said(5 if incarnation % 2 else 9, incarnation))
    assert gossip.known.boot(B) == 5
    says(gossip, C, Dead(B, 9, C))
    play(gossip, 1.0, 9.0, silent=(B,))
    assert not gossip.known.alive(B)
    assert (Change.JOINED, B) in changes(says(gossip, C, said(9, 20), now=9.0))
    assert gossip.known.boot(B) == 9 and not gossip.known.barred(B, 9)


def cloned(boot: int) -> Gossip:
    """One that hears another process, of the number 50, refute it again and again."""
    gossip = know(core(boot=boot), C)
    for turn in range(8):
        incarnation = gossip._membership.own.incarnation + 1
        says(gossip, C, Alive(ME, 50, incarnation, (COPY,)), now=1.0 + turn / 100)
    return gossip


def test_of_two_the_one_that_started_later_says_no_more_and_leads_no_more() -> None:
    first, later = cloned(7), cloned(90)
    for gossip in (first, later):
        play(gossip, 2.0, 12.0)
    assert first.known.leader().leader == ME
    assert later.known.leader() == Term()
    (double,) = later.known.doubles(12.0)
    assert (double.node, double.kept) == (ME, COPY[0])
    assert first.known.doubles(12.0)[0].other == COPY[0]
    before = later._membership.own.incarnation
    says(later, C, Alive(ME, 50, before + 5, (COPY,)), now=60.0)
    assert later._membership.own.incarnation == before
    # The first one is gone: somebody holds the id dead.
    for persist in of(Persist, says(later, C, Dead(ME, before + 6, C), now=61.0)):
        later.persisted(persist.kept, 61.0)
    assert later._membership.own.incarnation == before + 7
    play(later, 61.0, 75.0)
    assert later.known.leader().leader == ME


def test_where_it_is_stays_known_for_a_while_only() -> None:
    gossip = know(core(), C)
    for incarnation in range(1, 9):
        says(gossip, C, said(5 if incarnation % 2 else 9, incarnation))
    assert gossip.known.doubles(100.0) and not gossip.known.doubles(300.0)
    assert at(C) == gossip.known.addresses(C)[0]
