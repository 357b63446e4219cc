"""What was to stay loaded is loaded again when it was lost, and not when somebody ended it."""

from __future__ import annotations

import asyncio
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
from tests.leader.cluster import Cluster, model, placed
from tests.placement.fleets import GIB, MIB

PINNED = Endpoint("x", "m", "d", Backend.LOCAL, State.READY, pinned=True)
MINE = Record("a", "a", 1, (), 1, 2, "0")


def head(*endpoints: Endpoint, **changes: bool) -> Record:
    return replace(MINE, node="b", name="b", endpoints=endpoints, **changes)


class Watched:
    """A policy and its clock."""

    def __init__(self) -> None:
        self.policy = PinnedPolicy()
        self.now = 0.0

    def see(self, *records: Record) -> None:
        self.policy.observe((MINE, *records), self.now)

    def due(self, *records: Record, after: float = 0.0) -> list[str]:
        self.now += after
        self.see(*records)
        return [one.id for _, one in self.policy.due((MINE, *records), self.now)]


@pytest.fixture
def watched() -> Watched:
    one = Watched()
    one.see(head(PINNED))
    return one


def test_one_whose_head_is_gone_for_a_while_is_due_until_it_is_there(watched: Watched) -> None:
    assert watched.due() == []
    assert watched.due(after=STANDS - 1) == []
    assert watched.due(after=1.0) == ["x"]
    assert watched.due() == []
    assert watched.due(head(), after=AGAIN) == ["x"]  # Its machine is back, without it.
    again = replace(PINNED, id="y", state=State.LOADING)
    assert watched.due(head(again), after=AGAIN) == []
    assert watched.due(head(replace(again, state=State.FAILED)), after=AGAIN) == ["x"]
    assert watched.due(head(replace(again, state=State.READY)), after=AGAIN) == []
    assert watched.due(after=1.0) == []
    assert watched.due(after=STANDS) == ["y"]


def test_a_head_that_is_back_in_time_is_no_loss(watched: Watched) -> None:
    assert watched.due(after=1.0) == []
    assert watched.due(head(PINNED), after=STANDS - 2) == []
    assert watched.due(after=1.0) == []
    assert watched.due(after=STANDS - 1) == []


def test_one_that_broke_is_lost_and_one_that_was_ended_is_not(watched: Watched) -> None:
    broken = replace(PINNED, state=State.FAILED, answered=True)
    assert watched.due(head(broken)) == []
    assert watched.due(head(), after=STANDS) == ["x"]
    for ended in (head(), head(replace(PINNED, pinned=False)), head(replace(PINNED, state=State.DRAINING))):
        other = Watched()
        other.see(head(PINNED))
        other.see(ended)
        assert other.due() == []
        assert other.due(after=STANDS) == []
        assert not other.policy.is_lost("m", "d")


def test_one_that_is_lost_while_it_loads_is_loaded_again_and_one_that_does_not_load_is_not() -> None:
    loading = replace(PINNED, state=State.LOADING)
    for seen, due in ((), ["x"]), ((head(replace(PINNED, state=State.FAILED)),), []):
        watched = Watched()
        watched.see(head(loading))
        watched.see(*seen)
        assert watched.due(after=STANDS) == due


def test_one_that_leaves_a_draining_machine_is_loaded_elsewhere(watched: Watched) -> None:
    watched.see(head(PINNED, draining=True))
    watched.see(head(replace(PINNED, state=State.DRAINING), draining=True))
    assert watched.due(head(draining=True)) == []
    assert watched.due(head(draining=True), after=STANDS) == ["x"]


def test_one_that_ends_for_a_draining_worker_is_loaded_again(watched: Watched) -> None:
    watched.see(head(replace(PINNED, closing=True)))
    assert watched.due(head()) == []
    assert watched.due(head(), after=STANDS) == ["x"]


def test_what_answers_for_it_is_enough(watched: Watched) -> None:
    watched.see()
    assert watched.policy.is_lost("m", "d") and watched.policy.is_lost("M", "")
    assert watched.due(head(replace(PINNED, id="y", pinned=False)), after=STANDS) == []
    assert not watched.policy.is_lost("m", "d")
    assert watched.due(after=STANDS) == []


def test_nothing_is_due_where_most_machines_are_missing(watched: Watched) -> None:
    others = [replace(MINE, node=node) for node in "cd"]
    watched.see(head(PINNED), *others)
    watched.see()
    assert watched.due(after=STANDS) == []  # One of four.
    assert watched.due(others[0]) == ["x"]  # Two of four.


def test_it_is_forgotten_in_the_end_and_when_somebody_unloads_it(watched: Watched) -> None:
    watched.see()
    other = Watched()
    other.see(head(PINNED))
    other.see()
    other.policy.forget("m")
    assert other.due(after=STANDS) == []
    assert watched.due(after=FORGOTTEN) == []
    assert not watched.policy.is_lost("m", "d")


def test_what_an_ollama_keeps_is_its_own() -> None:
    watched = Watched()
    watched.see(head(replace(PINNED, backend=Backend.OLLAMA)))
    watched.see()
    assert watched.due(after=STANDS) == []


def test_of_two_alike_one_stays() -> None:
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


def test_what_is_lost_is_told_until_it_is_back(watched: Watched) -> None:
    assert watched.policy.lost(0.0) == ()
    watched.see()
    watched.policy.should_log(PINNED, "no room", 1.0)
    assert watched.policy.lost(9.0) == (LostModel("m", "b", 9.0, "no room"),)
    watched.see(head(PINNED))
    assert watched.policy.lost(9.0) == ()


def test_why_it_can_not_be_loaded_is_not_logged_at_each_try(watched: Watched) -> None:
    watched.see()
    told = [
        watched.policy.should_log(PINNED, f"{second} MiB are free", float(second)) for second in range(600)
    ]
    assert [second for second, news in enumerate(told) if news] == [0, int(TOLD_AGAIN)]


async def test_of_two_that_a_split_left_one_makes_room_and_ends_when_it_is_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
    cluster = Cluster()
    cluster.add("a", 700 * MIB, model())
    cluster.add("b", 1500 * MIB, model())
    await cluster.planner.start()
    try:
        first = await placed(cluster, Ensure("demo", context=2048, keep_alive=-1.0), pinned=True)
        away = cluster.nodes.pop("b")
        second = "second"
        alike = replace(away.endpoints[first], id=second, idle=400.0, active=1)
        cluster.nodes["a"].endpoints[second] = alike
        cluster.nodes["b"] = away
        await looked(cluster, 0.0)
        assert not cluster.asked("unload")
        cluster.ready(second, active=0)
        await looked(cluster, 0.0)
        ends = [request for _, request in cluster.asked("unload") if isinstance(request, Unload)]
        assert {(one.deployment, one.when_idle) for one in ends} == {(second, True)}
        assert "another like it stays loaded" in ends[0].reason
    finally:
        await cluster.planner.close()


async def test_the_leader_loads_it_again_as_it_was_asked_for(
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
        deployment = await placed(cluster, ask, pinned=True)
        first = orders(cluster)[0]
        assert first.plan.head == "b" and first.keep_alive == -1.0
        del cluster.nodes["b"]
        cluster.changed()
        for _ in range(10):
            await looked(cluster, STANDS)
        assert len(orders(cluster)) == 1
        assert next(r.getMessage() for r in caplog.records if "yet" in r.getMessage()).startswith(
            "demo:latest was to stay loaded and was lost"
        )
        cluster.add("c", 2 * GIB, model())
        cluster.changed()
        for _ in range(20):
            await looked(cluster, AGAIN)
        again = orders(cluster)[1]
        assert (again.plan.head, again.keep_alive, again.plan.asked) == ("c", -1.0, first.plan.asked)
        assert len([r for r in caplog.records if "yet" in r.getMessage()]) == 1
        assert again.deployment != deployment and len(orders(cluster)) == 2
    finally:
        await cluster.planner.close()


async def test_who_asks_for_it_first_has_it_stay_too_and_an_unload_ends_that() -> None:
    cluster = Cluster()
    cluster.add("a", 400 * MIB, model())
    for node in "bcd":
        cluster.add(node, 2 * GIB, model())
    await cluster.planner.start()
    try:
        ask = Ensure("demo", keep_alive=-1.0)
        for unloaded in (False, True):
            await placed(cluster, ask, pinned=True)
            await looked(cluster, 0.0)
            del cluster.nodes[orders(cluster)[-1].plan.head]
            cluster.changed()
            if unloaded:
                await cluster.planner.unload(Drop("demo"))
            ask = Ensure("demo")
        await placed(cluster, ask)
        assert [order.keep_alive for order in orders(cluster)] == [-1.0, -1.0, 300.0]
    finally:
        await cluster.planner.close()


async def test_who_may_lead_next_does_not_load_what_was_unloaded_while_it_was_lost() -> None:
    cluster = Cluster()
    cluster.add("a", 400 * MIB, model())
    cluster.add("b", 2 * GIB, model())
    cluster.add("c", 400 * MIB, model())
    view: Any = cluster.seen_by("c")
    other = leader.Leader(cluster.settings, view, view, view, clock=lambda: cluster.now)
    await cluster.planner.start()
    await other.start()
    try:
        await placed(cluster, Ensure("demo", keep_alive=-1.0), pinned=True)
        del cluster.nodes[orders(cluster)[0].plan.head]
        cluster.changed()
        assert [one.model for one in other.lost()] == ["demo:latest"]
        assert (await cluster.planner.unload(Drop("demo"))).forgotten
        told = [(node, drop) for node, drop in cluster.asked("drop")]
        assert told == [(node, Drop("demo")) for node in cluster.nodes if node != "a"]
        assert (await other.unload(Drop("demo"))).leader == "a" and other.lost() == ()
        cluster.calls_made.clear()
        assert not (await cluster.planner.unload(Drop("demo"))).forgotten
        assert not cluster.asked("drop")
    finally:
        await other.close()
        await cluster.planner.close()


def orders(cluster: Cluster) -> list[Deploy]:
    return [request for _, request in cluster.asked("deploy") if isinstance(request, Deploy)]


async def looked(cluster: Cluster, later: float) -> None:
    """So many seconds have passed, and the leader has looked at its records."""
    cluster.now += later
    cluster.changed()
    await asyncio.sleep(0.05)
