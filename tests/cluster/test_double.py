"""Two live machines with the same node id, because a state folder was copied."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Change, Persist
from sollold.cluster.gossip.double import Double, boot_number
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Alive, Dead, Ping
from sollold.cluster.gossip.term import Term
from tests.cluster.gossip_core import ME, B, C, address_of, changes, core, only, receive, run, with_members

FIRST, COPY = ("10.0.0.1", 11436), ("10.0.0.2", 11436)


def alive(boot: int, incarnation: int) -> Alive:
    return Alive(B, boot, incarnation, (FIRST if boot == 5 else COPY,))


def test_boot_numbers_increase_with_the_start_time() -> None:
    numbers = [boot_number(time_, chance) for time_ in (0.0, 1.8e9, 1.8e9 + 2) for chance in (0, 2**62 - 1)]
    assert [number // 2**32 for number in numbers] == sorted(number // 2**32 for number in numbers)
    assert all(0 < number < 2**63 and number % 2 for number in numbers)
    assert numbers[3] < numbers[4]


def test_the_first_of_two_live_processes_is_kept_and_one_event_is_reported() -> None:
    for first in (5, 9):
        gossip = with_members(core(), C)
        reported = []
        for incarnation in range(1, 40):
            boot = first if incarnation % 2 else 14 - first
            reported += changes(receive(gossip, C, alive(boot, incarnation), now=1.0 + incarnation / 100))
        assert reported.count((Change.DOUBLED, B)) == 1
        assert reported.count((Change.RESTARTED, B)) <= 5
        assert gossip.known.boot(B) == 5
        assert gossip.known.doubles(2.0) == (Double(B, FIRST[0], COPY[0]),)
        assert gossip.known.barred(B, 9) and not gossip.known.barred(B, 5)


def test_one_late_message_of_an_earlier_process_is_not_a_double() -> None:
    gossip = with_members(core(), C)
    reported = changes(receive(gossip, C, alive(5, 1), alive(9, 2), alive(5, 3), alive(9, 4)))
    reported += changes(receive(gossip, C, alive(12, 5), alive(9, 6), alive(12, 7)))
    assert (Change.DOUBLED, B) not in reported
    assert gossip.known.boot(B) == 12 and not gossip.known.doubles(2.0)


def test_a_datagram_in_the_name_of_an_old_process_does_not_bar_the_current_one() -> None:
    """Any member can send it; only statements that the old process signs show that it lives."""
    gossip = with_members(core(), C)
    receive(gossip, C, alive(5, 1), alive(9, 2))
    assert (Change.DOUBLED, B) not in changes(receive(gossip, B, Ping(2, ME), now=9.0, boot=5))
    assert gossip.known.boot(B) == 9 and not gossip.known.barred(B, 9)
    receive(gossip, B, alive(5, 3), alive(9, 4), now=9.1, boot=5)
    assert (Change.DOUBLED, B) in changes(receive(gossip, B, alive(5, 5), now=9.2, boot=5))
    assert gossip.known.boot(B) == 5 and gossip.known.barred(B, 9)


def test_the_second_process_is_accepted_once_the_first_is_dead() -> None:
    gossip = with_members(core(), C)
    for incarnation in range(1, 9):
        receive(gossip, C, alive(5 if incarnation % 2 else 9, incarnation))
    assert gossip.known.boot(B) == 5
    receive(gossip, C, Dead(B, 9, C))
    run(gossip, 1.0, 9.0, silent=(B,))
    assert not gossip.known.alive(B)
    assert (Change.JOINED, B) in changes(receive(gossip, C, alive(9, 20), now=9.0))
    assert gossip.known.boot(B) == 9 and not gossip.known.barred(B, 9)


def cloned(boot: int) -> Gossip:
    """A core that receives repeated refutations from another process of its node, with boot number 50."""
    gossip = with_members(core(boot=boot), C)
    for turn in range(8):
        incarnation = gossip._membership.own.incarnation + 1
        receive(gossip, C, Alive(ME, 50, incarnation, (COPY,)), now=1.0 + turn / 100)
    return gossip


def test_the_process_that_started_later_stops_refuting_and_leading() -> None:
    first, later = cloned(7), cloned(90)
    for gossip in (first, later):
        run(gossip, 2.0, 12.0)
    assert first.known.leader().leader == ME
    assert later.known.leader() == Term()
    (double,) = later.known.doubles(12.0)
    assert (double.node, double.kept) == (ME, COPY[0])
    assert first.known.doubles(12.0)[0].other == COPY[0]
    before = later._membership.own.incarnation
    receive(later, C, Alive(ME, 50, before + 5, (COPY,)), now=60.0)
    assert later._membership.own.incarnation == before
    # The first process is gone: another node reports the id dead.
    for persist in only(Persist, receive(later, C, Dead(ME, before + 6, C), now=61.0)):
        later.persisted(persist.kept, 61.0)
    assert later._membership.own.incarnation == before + 7
    run(later, 61.0, 75.0)
    assert later.known.leader().leader == ME


def test_doubles_are_forgotten_after_some_minutes() -> None:
    gossip = with_members(core(), C)
    for incarnation in range(1, 9):
        receive(gossip, C, alive(5 if incarnation % 2 else 9, incarnation))
    assert gossip.known.doubles(100.0) and not gossip.known.doubles(300.0)
    assert address_of(C) == gossip.known.addresses(C)[0]
