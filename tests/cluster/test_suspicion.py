"""Parts of the gossip core: suspicion, awareness, broadcast queue, probe order and timers."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.cluster.gossip.awareness import Awareness
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.probe_order import ProbeOrder
from sollold.cluster.gossip.suspicion import Suspicion
from sollold.cluster.gossip.timers import Timers


def suspicion(wanted: int = 2) -> Suspicion:
    return Suspicion("a", 100.0, least=3.0, most=18.0, wanted=wanted)


def test_each_additional_accuser_shortens_a_suspicion() -> None:
    suspect = suspicion()
    assert suspect.deadline == 118.0
    assert suspect.confirm("b")
    assert 103.0 < suspect.deadline < 118.0
    assert suspect.confirm("c")
    assert suspect.deadline == pytest.approx(103.0)


def test_a_repeated_accusation_changes_nothing() -> None:
    suspect = suspicion()
    assert not suspect.confirm("a")
    assert suspect.deadline == 118.0


def test_accusers_beyond_the_wanted_number_are_ignored() -> None:
    suspect = suspicion()
    assert [suspect.confirm(by) for by in "bcd"] == [True, True, False]


def test_without_other_nodes_the_minimum_timeout_applies() -> None:
    assert suspicion(wanted=0).deadline == 103.0


def test_other_evidence_shortens_but_never_extends_a_suspicion() -> None:
    suspect = suspicion()
    suspect.quicken(0.5, 101.0)
    assert suspect.deadline == pytest.approx(101.5)
    suspect.quicken(10.0, 101.0)
    assert suspect.deadline == pytest.approx(101.5)


def test_awareness_stretches_timeouts_within_limits() -> None:
    awareness = Awareness(8)
    assert awareness.stretch(0.5) == 0.5
    awareness.worse(3)
    assert awareness.stretch(0.5) == 2.0
    awareness.worse(100)
    assert awareness.score == 7
    for _ in range(10):
        awareness.better()
    assert awareness.score == 0


def test_broadcasts_end_after_their_number_of_transmissions() -> None:
    queue = BroadcastQueue()
    queue.add("member", "a", b"a")
    assert [queue.take_messages(100, 3) for _ in range(4)] == [[b"a"], [b"a"], [b"a"], []]
    assert len(queue) == 0


def test_a_newer_broadcast_replaces_an_older_one_of_its_subject() -> None:
    queue = BroadcastQueue()
    queue.add("member", "a", b"old")
    queue.take_messages(100, 9)
    queue.add("member", "a", b"new")
    queue.add("record", "a", b"record")
    assert sorted(queue.take_messages(100, 9)) == [b"new", b"record"]


def test_the_least_sent_broadcasts_go_first() -> None:
    queue = BroadcastQueue()
    queue.add("member", "a", b"aaaaaaaaaa")
    queue.take_messages(100, 9)
    queue.add("member", "b", b"bbbbbbbbbb")
    assert queue.take_messages(10, 9) == [b"bbbbbbbbbb"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(8, 60)), max_size=40), st.integers(8, 200))
def test_broadcasts_fit_the_available_bytes_and_are_all_sent(
    pieces: list[tuple[int, int]], room: int
) -> None:
    queue = BroadcastQueue()
    for node, size in pieces:
        queue.add("member", str(node), bytes(size))
    fitting = sum(1 for size in dict(pieces).values() if size <= room)
    sent = 0
    for _ in range(4 * len(pieces) + 4):
        taken = queue.take_messages(room, 2)
        assert sum(map(len, taken)) <= room
        sent += len(taken)
    assert sent == 2 * fitting


def test_each_round_probes_every_node_once() -> None:
    order = ProbeOrder(Random(1))
    for node in "abcdef":
        order.add(node)
    order.remove("c")
    for _ in range(5):
        assert sorted(filter(None, (order.next(_any) for _ in range(5)))) == ["a", "b", "d", "e", "f"]


def test_a_suspect_is_probed_next() -> None:
    order = ProbeOrder(Random(1))
    for node in "abcdef":
        order.add(node)
    order.hurry("e")
    assert order.next(_any) == "e"
    order.hurry("d")
    order.remove("d")
    assert order.next(_any) != "d"
    order.hurry("e")
    assert order.next(lambda node: node == "a") == "e"


def test_an_empty_round_has_no_next_node() -> None:
    assert ProbeOrder(Random(1)).next(_any) is None


def test_nodes_that_need_no_probe_are_skipped() -> None:
    order = ProbeOrder(Random(1))
    for node in "abcdef":
        order.add(node)
    for _ in range(5):
        assert {order.next(lambda node: node in "be") for _ in range(2)} == {"b", "e"}
    assert order.next(lambda node: False) is None


def _any(node: str) -> bool:
    return True


def test_due_timers_run_in_order_including_added_ones() -> None:
    timers = Timers()
    calls: list[tuple[str, float]] = []

    def call(name: str, now: float) -> None:
        calls.append((name, now))
        if name == "first":
            timers.at(2.5, call, "added")

    timers.at(3.0, call, "third")
    timers.at(1.0, call, "first")
    timers.at(9.0, call, "later")
    timers.run(3.0)
    assert calls == [("first", 3.0), ("added", 3.0), ("third", 3.0)]
    assert timers.next() == 9.0
    timers.shift(2.0)
    assert timers.next() == 11.0


def test_a_cancelled_timer_does_not_run() -> None:
    timers = Timers()
    calls: list[str] = []

    def call(name: str, now: float) -> None:
        calls.append(name)

    first, second, third = (
        timers.at(when, call, name) for when, name in ((1.0, "a"), (2.0, "b"), (3.0, "c"))
    )
    first.cancel()
    assert timers.next() == 2.0
    third.cancel()
    timers.run(3.0)
    assert calls == ["b"]
    assert timers.next() == float("inf")
    second.cancel()  # it has already run
    timers.at(4.0, call, "d")
    timers.run(4.0)
    assert calls == ["b", "d"]


@pytest.mark.parametrize(("nodes", "times"), [(1, 4), (8, 4), (9, 4), (10, 8), (100, 12), (1000, 16)])
def test_larger_clusters_retransmit_more_often(nodes: int, times: int) -> None:
    assert LAN.retransmits(nodes) == times


@pytest.mark.parametrize(("nodes", "seconds"), [(2, 30.0), (32, 30.0), (33, 60.0), (64, 60.0), (65, 90.0)])
def test_larger_clusters_exchange_whole_states_less_often(nodes: int, seconds: float) -> None:
    assert LAN.push_pull_every(nodes) == seconds
