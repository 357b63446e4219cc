"""When a model's queue is long enough for another replica."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.leader import leader
from sollold.leader.replicas import AGAIN, STANDS, ReplicaPolicy
from tests.doubles import until
from tests.leader.cluster import Cluster

ENDPOINT = Endpoint("x", "m", "d", Backend.LOCAL, State.READY, slots=2)


def records(*endpoints: Endpoint) -> list[Record]:
    return [Record("a", "a", 1, (), 1, 2, "0", endpoints=endpoints)]


def test_a_long_queue_that_persists_requests_one_replica() -> None:
    policy = ReplicaPolicy()
    busy = records(replace(ENDPOINT, waiting=5))
    assert policy.observe(busy, 0.0) == []
    assert policy.observe(busy, STANDS - 1) == []
    assert policy.observe(busy, STANDS) == [("m", "d", False)]
    assert policy.observe(busy, STANDS + 5) == []
    assert policy.observe(busy, STANDS + AGAIN) == [("m", "d", False)]


def test_a_short_or_brief_queue_requests_no_replica() -> None:
    policy = ReplicaPolicy()
    for now in range(100):
        waiting = 9 if now % 7 else 0
        assert policy.observe(records(replace(ENDPOINT, waiting=waiting)), float(now)) == []
    for now in range(100, 200):
        assert policy.observe(records(replace(ENDPOINT, waiting=3)), float(now)) == []


def test_ollama_queues_count_but_not_its_unloaded_models() -> None:
    policy = ReplicaPolicy()
    ollama = replace(ENDPOINT, id="ollama:m", backend=Backend.OLLAMA, slots=1)
    offers = [replace(ollama, loaded=False, slots=9), replace(ollama, loaded=False, slots=9)]
    busy = records(replace(ollama, waiting=5), *offers)
    assert policy.observe(busy, 0.0) == []
    assert policy.observe(busy, STANDS) == [("m", "d", False)]


def test_endpoints_share_a_queue_and_a_loading_one_is_awaited() -> None:
    policy = ReplicaPolicy()
    two = records(replace(ENDPOINT, waiting=5), replace(ENDPOINT, id="y"))
    loading = records(replace(ENDPOINT, waiting=9), replace(ENDPOINT, id="y", state=State.LOADING))
    for now in range(0, 60, 2):
        assert policy.observe(two, float(now)) == []
        assert policy.observe(loading, now + 1.0) == []


async def test_the_periodic_check_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster, checks = Cluster(), 0
    cluster.add("a", 1 << 30)

    def failing_once(records: Iterable[Record], now: float) -> list[tuple[str, str, bool]]:
        nonlocal checks
        checks += 1
        if checks == 1:
            raise OSError("too many open files")
        return []

    monkeypatch.setattr(cluster.planner._replica_policy, "observe", failing_once)
    await cluster.planner.start()
    await until(lambda: checks > 2)
    await cluster.planner.close()
