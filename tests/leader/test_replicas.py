"""When a model's line is long enough for one more endpoint."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.leader.replicas import AGAIN, STANDS, ReplicaPolicy

ONE = Endpoint("x", "m", "d", Backend.LOCAL, State.READY, slots=2)


def records(*endpoints: Endpoint) -> list[Record]:
    return [Record("a", "a", 1, (), 1, 2, "0", endpoints=endpoints)]


def test_a_long_line_that_stands_wants_one_more_once() -> None:
    lines = ReplicaPolicy()
    long = records(replace(ONE, waiting=5))
    assert lines.observe(long, 0.0) == []
    assert lines.observe(long, STANDS - 1) == []
    assert lines.observe(long, STANDS) == [("m", "d", False)]
    assert lines.observe(long, STANDS + 5) == []
    assert lines.observe(long, STANDS + AGAIN) == [("m", "d", False)]


def test_a_short_or_passing_line_does_not() -> None:
    lines = ReplicaPolicy()
    for now in range(100):
        waiting = 9 if now % 7 else 0
        assert lines.observe(records(replace(ONE, waiting=waiting)), float(now)) == []
    for now in range(100, 200):
        assert lines.observe(records(replace(ONE, waiting=3)), float(now)) == []


def test_an_ollamas_line_counts_and_what_it_has_not_loaded_is_no_place() -> None:
    lines = ReplicaPolicy()
    ollama = replace(ONE, id="ollama:m", backend=Backend.OLLAMA, slots=1)
    offers = [replace(ollama, loaded=False, slots=9), replace(ollama, loaded=False, slots=9)]
    long = records(replace(ollama, waiting=5), *offers)
    assert lines.observe(long, 0.0) == []
    assert lines.observe(long, STANDS) == [("m", "d", False)]


def test_two_endpoints_share_a_line_and_a_loading_one_is_waited_for() -> None:
    lines = ReplicaPolicy()
    two = records(replace(ONE, waiting=5), replace(ONE, id="y"))
    loading = records(replace(ONE, waiting=9), replace(ONE, id="y", state=State.LOADING))
    for now in range(0, 60, 2):
        assert lines.observe(two, float(now)) == []
        assert lines.observe(loading, now + 1.0) == []
