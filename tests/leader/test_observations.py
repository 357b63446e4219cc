"""The leader's short-term memory."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Endpoint, Grant, GrantState, State
from sollold.leader.observations import ALL_EVERY, GOOD_SERVICE, Observations
from tests.doubles import record

READY = Endpoint("d1", "demo:latest", "1", Backend.LOCAL, State.READY)


def test_long_service_is_noticed_in_a_record_that_does_not_change() -> None:
    observations = Observations(60.0)
    head = replace(record("a"), endpoints=(READY,))
    for failure in range(3):
        observations.crashes.failed("a", "it crashed", float(failure))
    observations.observe((head,), 10.0)
    observations.observe((head,), 10.0 + GOOD_SERVICE - 1)
    assert observations.crashes.known("a", 10.0 + GOOD_SERVICE)
    observations.observe((head,), 10.0 + GOOD_SERVICE + ALL_EVERY)
    assert not observations.crashes.known("a", 10.0 + GOOD_SERVICE)


def test_a_node_that_is_back_with_an_unchanged_record_counts_again() -> None:
    observations = Observations(60.0)
    failed = replace(READY, state=State.FAILED, reason="it crashed")
    head = replace(
        record("a"), endpoints=(failed,), grants=(Grant("d2", "CPU", 1, "a", GrantState.COMMITTED),)
    )
    for now in (1.0, 2.0):
        observations.observe((head,), now)
    assert observations.models.blocked("1", 2.0) is None
    observations.observe((), 3.0)
    observations.observe((head,), 4.0)
    assert observations.models.blocked("1", 4.0) is not None
