"""Pinned models are loaded again after they were lost, but not after an unload."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, Record, State
from sollold.engines.commands import Deploy, Unload
from sollold.leader import leader
from sollold.leader.messages import Drop, Ensure
from sollold.leader.pinned import (
    AGAIN,
    FORGOTTEN,
    STANDS,
    TOLD_AGAIN,
    LostModel,
    PinnedPolicy,
    redundant_pins,
)
from tests.leader.cluster import Cluster, fail_deployment, let_leader_look, load, model
from tests.placement.fleets import GIB, MIB

PINNED = Endpoint("x", "m", "d", Backend.LOCAL, State.READY, pinned=True)
MINE = Record("a", "a", 1, (), 1, 2, "0")


def head(*endpoints: Endpoint, **changes: Any) -> Record:
    return replace(MINE, node="b", name="b", endpoints=endpoints, **changes)


class ObservedPolicy:
    """A policy and its clock, in seconds."""

    def __init__(self) -> None:
        self.policy = PinnedPolicy()
        self.now = 0.0

    def see(self, *records: Record) -> None:
        self.policy.observe((MINE, *records), self.now)

    def due(self, *records: Record, after: float = 0.0) -> list[str]:
        self.now += after
        self.see(*records)
        return [endpoint.id for _, endpoint in self.policy.due((MINE, *records), self.now)]


@pytest.fixture
def observed() -> ObservedPolicy:
    observed = ObservedPolicy()
    observed.see(head(PINNED))
    return observed


def test_a_model_whose_head_is_gone_is_due_until_it_is_loaded(observed: ObservedPolicy) -> None:
    assert observed.due() == []
    assert observed.due(after=STANDS - 1) == []
    assert observed.due(after=1.0) == ["x"]
    assert observed.due() == []
    assert observed.due(head(), after=AGAIN) == ["x"]  # Its machine is back without it.
    again = replace(PINNED, id="y", state=State.LOADING)
    assert observed.due(head(again), after=AGAIN) == []
    assert observed.due(head(replace(again, state=State.FAILED)), after=AGAIN) == ["x"]
    assert observed.due(head(replace(again, state=State.READY)), after=AGAIN) == []
    assert observed.due(after=1.0) == []
    assert observed.due(after=STANDS) == ["y"]


def test_a_head_that_returns_in_time_is_no_loss(observed: ObservedPolicy) -> None:
    assert observed.due(after=1.0) == []
    assert observed.due(head(PINNED), after=STANDS - 2) == []
    assert observed.due(after=1.0) == []
    assert observed.due(after=STANDS - 1) == []


def test_a_failed_model_is_lost_but_not_an_ended_one(observed: ObservedPolicy) -> None:
    broken = replace(PINNED, state=State.FAILED, answered=True)
    assert observed.due(head(broken)) == []
    assert observed.due(head(), after=STANDS) == ["x"]
    for ended in (head(), head(replace(PINNED, pinned=False)), head(replace(PINNED, state=State.DRAINING))):
        other = ObservedPolicy()
        other.see(head(PINNED))
        other.see(ended)
        assert other.due() == []
        assert other.due(after=STANDS) == []
        assert not other.policy.is_lost("m", "d")


def test_a_model_lost_while_loading_is_due_but_not_one_that_failed_to_load() -> None:
    loading = replace(PINNED, state=State.LOADING)
    for seen, due in ((), ["x"]), ((head(replace(PINNED, state=State.FAILED)),), []):
        observed = ObservedPolicy()
        observed.see(head(loading))
        observed.see(*seen)
        assert observed.due(after=STANDS) == due


def test_a_model_on_a_draining_machine_is_loaded_elsewhere(observed: ObservedPolicy) -> None:
    observed.see(head(PINNED, draining=True))
    observed.see(head(replace(PINNED, state=State.DRAINING), draining=True))
    assert observed.due(head(draining=True)) == []
    assert observed.due(head(draining=True), after=STANDS) == ["x"]


def test_a_model_that_ends_because_of_a_draining_worker_is_due(observed: ObservedPolicy) -> None:
    observed.see(head(replace(PINNED, closing=True)))
    assert observed.due(head()) == []
    assert observed.due(head(), after=STANDS) == ["x"]


def test_a_model_that_is_first_seen_ending_because_of_a_drain_is_due() -> None:
    # An idle one ends in the turn of the loop in which the drain is noticed.
    for ending in (
        head(replace(PINNED, state=State.DRAINING, closing=True)),
        head(replace(PINNED, state=State.DRAINING), draining=True),
    ):
        observed = ObservedPolicy()
        observed.see(head(PINNED))
        observed.see(ending)
        assert observed.due(head()) == []
        assert observed.due(head(), after=STANDS) == ["x"]


def test_a_replica_that_served_before_the_loss_only_postpones_the_reload() -> None:
    replica = replace(MINE, node="c", endpoints=(replace(PINNED, id="y", pinned=False),))
    observed = ObservedPolicy()
    observed.see(head(PINNED), replica)
    assert observed.due(replica) == []
    assert observed.due(replica, after=2 * FORGOTTEN) == []
    assert observed.policy.lost(observed.now) == ()
    assert observed.policy.is_lost("m", "d")
    gone = replace(replica, endpoints=())
    assert observed.due(gone) == []
    assert observed.due(gone, after=STANDS) == ["x"]


def test_another_endpoint_of_the_model_is_sufficient(observed: ObservedPolicy) -> None:
    observed.see()
    assert observed.policy.is_lost("m", "d") and observed.policy.is_lost("M", "")
    assert observed.due(head(replace(PINNED, id="y", pinned=False)), after=STANDS) == []
    assert not observed.policy.is_lost("m", "d")
    assert observed.due(after=STANDS) == []


def test_nothing_is_due_while_most_machines_are_missing(observed: ObservedPolicy) -> None:
    others = [replace(MINE, node=node) for node in "cd"]
    observed.see(head(PINNED), *others)
    observed.see()
    assert observed.due(after=STANDS) == []  # One of four.
    assert observed.due(others[0]) == ["x"]  # Two of four.


def test_machines_that_were_stopped_on_purpose_are_not_missing(observed: ObservedPolicy) -> None:
    others = [replace(MINE, node=node) for node in "cde"]
    observed.see(head(PINNED), *others)
    observed.see(head(PINNED, draining=True), *(replace(record, draining=True) for record in others))
    observed.see()
    assert observed.due(after=STANDS) == ["x"]


def test_a_lost_model_is_forgotten_after_a_time_or_an_unload(observed: ObservedPolicy) -> None:
    observed.see()
    other = ObservedPolicy()
    other.see(head(PINNED))
    other.see()
    other.policy.forget("m")
    assert other.due(after=STANDS) == []
    assert observed.due(after=FORGOTTEN) == []
    assert not observed.policy.is_lost("m", "d")


@pytest.mark.parametrize("leaving", [head(PINNED, draining=True), head(replace(PINNED, closing=True))])
def test_a_model_that_is_unloaded_while_it_was_about_to_end_stays_unloaded(leaving: Record) -> None:
    for refused in (False, True):
        observed = ObservedPolicy()
        observed.see(leaving)
        observed.policy.forget("m")
        observed.policy.note_unloading(["x"])
        observed.see(leaving)
        if refused:
            observed.policy.keep("x")
            observed.see(leaving)
        ending = replace(leaving.endpoints[0], state=State.DRAINING)
        observed.see(replace(leaving, endpoints=(ending,)))
        observed.see(replace(leaving, endpoints=()))
        assert observed.due(after=STANDS) == (["x"] if refused else [])


def test_models_pinned_in_ollama_are_not_reloaded() -> None:
    observed = ObservedPolicy()
    observed.see(head(replace(PINNED, backend=Backend.OLLAMA)))
    observed.see()
    assert observed.due(after=STANDS) == []


def test_one_of_two_equal_pins_is_redundant() -> None:
    other = replace(PINNED, id="y", idle=9.0)
    assert redundant_pins((head(PINNED), replace(MINE, endpoints=(other,)))) == {"y": "a"}
    for kept in (replace(other, active=1), replace(other, context=99)):
        assert redundant_pins((head(PINNED), replace(MINE, endpoints=(kept,)))) == {"x": "b"}
    for different in (
        replace(other, pinned=False),
        replace(other, state=State.LOADING),
        replace(other, closing=True),
        replace(other, digest="e"),
        replace(other, asked=Asked(context=4096)),
        replace(other, backend=Backend.OLLAMA),
    ):
        assert redundant_pins((head(PINNED), replace(MINE, endpoints=(different,)))) == {}
    assert redundant_pins((head(PINNED), replace(MINE, endpoints=(other,), draining=True))) == {}


def test_a_lost_model_is_reported_until_it_is_back(observed: ObservedPolicy) -> None:
    assert observed.policy.lost(0.0) == ()
    observed.see()
    observed.policy.should_log(PINNED, "no room", 1.0)
    assert observed.policy.lost(9.0) == (LostModel("m", "b", 9.0, "no room"),)
    observed.see(head(PINNED))
    assert observed.policy.lost(9.0) == ()


def test_the_reason_for_a_failed_load_is_not_logged_at_each_attempt(observed: ObservedPolicy) -> None:
    observed.see()
    logged = [
        observed.policy.should_log(PINNED, f"{second} MiB are free", float(second)) for second in range(600)
    ]
    assert [second for second, should_log in enumerate(logged) if should_log] == [0, int(TOLD_AGAIN)]


async def test_a_duplicate_after_a_partition_ends_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.add("a", 700 * MIB, model())
    cluster.add("b", 1500 * MIB, model())
    await cluster.planner.start()
    try:
        first = await load(cluster, Ensure("demo", context=2048, keep_alive=-1.0), pinned=True)
        away = cluster.nodes.pop("b")
        second = "second"
        duplicate = replace(away.endpoints[first], id=second, idle=400.0, active=1)
        cluster.nodes["a"].endpoints[second] = duplicate
        cluster.nodes["b"] = away
        await let_leader_look(cluster, 0.0)
        assert not cluster.requests("unload")
        cluster.ready(second, active=0)
        await let_leader_look(cluster, 0.0)
        unloads = [request for _, request in cluster.requests("unload") if isinstance(request, Unload)]
        assert {(request.deployment, request.when_idle) for request in unloads} == {(second, True)}
        assert "another like it stays loaded" in unloads[0].reason
    finally:
        await cluster.planner.close()


async def test_the_leader_reloads_a_lost_model_with_its_options(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.add("a", 400 * MIB, model())
    cluster.add("b", 2 * GIB, model())
    await cluster.planner.start()
    try:
        ask = Ensure("demo", context=4096, slots=2, type_k="q8_0", type_v="q8_0", keep_alive=-1.0)
        deployment = await load(cluster, ask, pinned=True)
        first = deploys(cluster)[0]
        assert first.plan.head == "b" and first.keep_alive == -1.0
        del cluster.nodes["b"]
        cluster.changed()
        for _ in range(10):
            await let_leader_look(cluster, STANDS)
        assert len(deploys(cluster)) == 1
        assert next(r.getMessage() for r in caplog.records if "yet" in r.getMessage()).startswith(
            "demo:latest was to stay loaded and was lost"
        )
        cluster.add("c", 2 * GIB, model())
        cluster.changed()
        for _ in range(20):
            await let_leader_look(cluster, AGAIN)
        again = deploys(cluster)[1]
        assert (again.plan.head, again.keep_alive, again.plan.asked) == ("c", -1.0, first.plan.asked)
        assert len([r for r in caplog.records if "yet" in r.getMessage()]) == 1
        assert again.deployment != deployment and len(deploys(cluster)) == 2
    finally:
        await cluster.planner.close()


async def test_a_lost_model_that_was_updated_is_loaded_in_its_newer_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.shapes["d2"] = cluster.shapes["d1"]
    cluster.add("a", 400 * MIB, model())
    cluster.add("b", 2 * GIB, model())
    await cluster.planner.start()
    try:
        await load(cluster, Ensure("demo", keep_alive=-1.0), pinned=True)
        del cluster.nodes["b"]
        cluster.nodes["a"].models = [model(digest="d2")]
        cluster.add("c", 2 * GIB, model(digest="d2"))
        cluster.changed()
        await let_leader_look(cluster, STANDS)
        again = deploys(cluster)[1]
        assert (again.plan.digest, again.keep_alive) == ("d2", -1.0)
        cluster.ready(again.deployment, pinned=True)
        await let_leader_look(cluster, AGAIN)
        assert not cluster.planner.lost()
        assert len(deploys(cluster)) == 2
    finally:
        await cluster.planner.close()


async def test_a_pinned_model_that_was_updated_is_replaced_by_its_newer_version_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.shapes["d2"] = cluster.shapes["d1"]
    cluster.add("a", 400 * MIB, model())
    cluster.add("b", 2 * GIB, model())
    await cluster.planner.start()
    try:
        old = await load(cluster, Ensure("demo", keep_alive=-1.0), pinned=True, active=1)
        cluster.nodes["b"].models = [model(digest="d2")]
        cluster.changed()
        await let_leader_look(cluster, STANDS)
        # Another node has it still.
        cluster.ready(old, active=0, idle=STANDS)
        await let_leader_look(cluster, STANDS)
        assert not cluster.requests("unload")
        cluster.nodes["a"].models = [model(digest="d2")]
        cluster.ready(old, active=1)
        await let_leader_look(cluster, STANDS)
        assert not cluster.requests("unload")
        cluster.ready(old, active=0, idle=STANDS)
        await let_leader_look(cluster, 0.0)
        (node, unload), *_ = cluster.requests("unload")
        assert isinstance(unload, Unload)
        assert (node, unload.deployment, unload.when_idle) == ("b", old, True)
        cluster.nodes["b"].unload(replace(unload, when_idle=False))
        await let_leader_look(cluster, STANDS)
        again = deploys(cluster)[1]
        assert (again.plan.digest, again.keep_alive) == ("d2", -1.0)
    finally:
        await cluster.planner.close()


async def test_the_newer_version_of_a_pinned_model_stays_loaded_too() -> None:
    cluster = Cluster()
    cluster.shapes["d2"] = cluster.shapes["d1"]
    cluster.add("a", 4 * GIB, model())
    await cluster.planner.start()
    try:
        await load(cluster, Ensure("demo", keep_alive=-1.0), pinned=True)
        cluster.nodes["a"].models = [model(digest="d2")]
        await load(cluster, Ensure("demo", "d2"))
        assert [(deploy.plan.digest, deploy.keep_alive) for deploy in deploys(cluster)] == [
            ("d1", -1.0),
            ("d2", -1.0),
        ]
    finally:
        await cluster.planner.close()


async def test_a_pinned_model_whose_reload_with_more_context_fails_is_loaded_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.add("a", 2 * GIB, model())
    await cluster.planner.start()
    try:
        await load(cluster, Ensure("demo", context=2048, keep_alive=-1.0), pinned=True)
        larger = await cluster.planner.ensure(Ensure("demo", context=8192))
        cluster.ready(larger.deployment, state=State.LOADING, pinned=True)
        await let_leader_look(cluster, STANDS)
        assert [deploy.plan.asked.context for deploy in deploys(cluster)] == [2048, 8192]
        fail_deployment(cluster, larger.deployment)
        await let_leader_look(cluster, STANDS)
        assert [deploy.plan.asked.context for deploy in deploys(cluster)] == [2048, 8192, 2048]
        again = deploys(cluster)[-1]
        assert again.keep_alive == -1.0
        cluster.ready(again.deployment, pinned=True)
        await cluster.planner.unload(Drop("demo"))
        await let_leader_look(cluster, STANDS)
        await let_leader_look(cluster, STANDS)
        assert len(deploys(cluster)) == 3
    finally:
        await cluster.planner.close()


async def test_a_request_that_reloads_a_lost_model_pins_it_until_an_unload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.add("a", 400 * MIB, model())
    for node in "bcd":
        cluster.add(node, 2 * GIB, model())
    await cluster.planner.start()
    try:
        ask = Ensure("demo", keep_alive=-1.0)
        for unloaded in (False, True):
            await load(cluster, ask, pinned=True)
            await let_leader_look(cluster, 0.0)
            del cluster.nodes[deploys(cluster)[-1].plan.head]
            cluster.changed()
            if unloaded:
                await cluster.planner.unload(Drop("demo"))
            ask = Ensure("demo")
        await load(cluster, ask)
        assert [deploy.keep_alive for deploy in deploys(cluster)] == [-1.0, -1.0, 300.0]
    finally:
        await cluster.planner.close()


async def test_an_unload_of_a_lost_model_reaches_possible_leaders() -> None:
    cluster = Cluster()
    cluster.add("a", 400 * MIB, model())
    cluster.add("b", 2 * GIB, model())
    cluster.add("c", 400 * MIB, model())
    view: Any = cluster.seen_by("c")
    other = leader.Leader(cluster.settings, view, view, view, clock=lambda: cluster.now)
    await cluster.planner.start()
    await other.start()
    try:
        await load(cluster, Ensure("demo", keep_alive=-1.0), pinned=True)
        del cluster.nodes[deploys(cluster)[0].plan.head]
        cluster.changed()
        assert [lost.model for lost in other.lost()] == ["demo:latest"]
        assert (await cluster.planner.unload(Drop("demo"))).forgotten
        drops = [(node, drop) for node, drop in cluster.requests("drop")]
        assert drops == [(node, Drop("demo")) for node in cluster.nodes if node != "a"]
        assert (await other.unload(Drop("demo"))).leader == "a" and other.lost() == ()
        cluster.calls_made.clear()
        assert not (await cluster.planner.unload(Drop("demo"))).forgotten
        assert not cluster.requests("drop")
    finally:
        await other.close()
        await cluster.planner.close()


def deploys(cluster: Cluster) -> list[Deploy]:
    return [request for _, request in cluster.requests("deploy") if isinstance(request, Deploy)]
