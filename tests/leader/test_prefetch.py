"""A machine that would run a model better gets the file first, where that pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sollold.engines.commands import Deploy, Fetch, Fetched
from sollold.leader import leader
from sollold.leader.messages import Ensure, Verdict
from sollold.settings.schema import ModelSettings, PlacementSettings, Settings
from tests.leader.cluster import Cluster, cpu_device, model, refuse
from tests.placement.fleets import GIB, MIB

SETTINGS = Settings(placement=PlacementSettings(context=2048, slots=1))
ASK = Ensure("demo")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FETCH_LOOK", 0.0)


def small_ones(settings: Settings = SETTINGS) -> Cluster:
    """Three machines of which none holds it alone; a has the file."""
    cluster = Cluster(settings)
    for name in "abc":
        cluster.add(name, 450 * MIB, *([model()] if name == "a" else []))
    return cluster


def fetches(cluster: Cluster, node: str, *states: Fetched) -> None:
    """The node answers so, one state after the other; with ``done`` it has the file."""
    left = list(states)

    async def hook(method: str, request: object) -> object | None:
        if method != "fetch":
            return None
        state = left.pop(0)
        if state.done:
            cluster.nodes[node].models.append(model(source="own"))
        return state

    cluster.nodes[node].hook = hook


async def test_a_big_idle_machine_gets_the_file_rather_than_a_part() -> None:
    cluster = small_ones()
    cluster.add("d", 4 * GIB)
    fetches(cluster, "d", Fetched(), Fetched(completed=1, total=4), Fetched(done=True))
    preview = await cluster.planner.preview(ASK)
    assert preview.ok and preview.plan is not None and preview.plan.head == "d"
    assert "host-d fetches the file of demo:latest first, 820 MiB" in preview.message
    assert preview.plan is not None and preview.plan.reasons and preview.message not in preview.plan.reasons
    assert cluster.asked("fetch") == [], "a look changes nothing"
    first = await cluster.planner.ensure(ASK)
    assert (first.verdict, first.deployment) == (Verdict.PLANNING, "")
    assert "25% of it has come" in (await cluster.planner.ensure(ASK)).message
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING
    assert {request for _, request in cluster.asked("fetch")} == {Fetch(cluster.term, "demo:latest", "d1")}
    placed = await cluster.planner.ensure(ASK)
    assert (placed.verdict, placed.node) == (Verdict.WAIT, "d")
    ((_, deploy),) = cluster.asked("deploy")
    assert isinstance(deploy, Deploy) and deploy.plan.shares == ()


async def test_a_machine_that_can_not_fetch_is_done_without() -> None:
    cluster = small_ones()
    cluster.add("d", 4 * GIB)
    fetches(cluster, "d", Fetched(failed="its disk has no room to spare"))
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "no room to spare" in answer.message
    assert (await cluster.planner.ensure(ASK)).node == "a"
    cluster = small_ones()
    cluster.add("d", 4 * GIB)
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING, "d knows no such command"
    assert (await cluster.planner.ensure(ASK)).node == "a"


async def test_where_the_only_machine_with_the_file_refuses_another_gets_it() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 4 * GIB, model()).hook = refuse("the term can't be written")
    cluster.add("b", 4 * GIB)
    fetches(cluster, "b", Fetched(completed=1, total=4), Fetched(done=True))
    assert "25% of it has come" in (await cluster.planner.ensure(ASK)).message
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.PLANNING
    placed = await cluster.planner.ensure(ASK)
    assert (placed.verdict, placed.node) == (Verdict.WAIT, "b")


@pytest.mark.parametrize(
    ("seconds", "bandwidth"),
    [
        (0.0, 20e9),  # the settings forbid it
        (5.0, 20e9),  # 820 MiB take longer than that over a link of 1 Gb/s
        (300.0, 6e9),  # it would compute too slowly to make up for the copy
    ],
)
async def test_where_it_does_not_pay_or_is_not_wanted_the_model_is_spread(
    seconds: float, bandwidth: float
) -> None:
    cluster = small_ones(replace(SETTINGS, models=ModelSettings(fetch_seconds=seconds)))
    cluster.add("d", 0, devices=(cpu_device(4 * GIB, bandwidth),))
    answer = await cluster.planner.ensure(ASK)
    assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
    assert cluster.asked("fetch") == []


async def test_what_fits_nowhere_where_the_file_is_goes_where_it_fits() -> None:
    alone = replace(SETTINGS.placement, enable_distributed=False)
    cluster = small_ones(replace(SETTINGS, placement=alone))
    assert (await cluster.planner.ensure(ASK)).fault == "too_big"
    cluster.add("d", 0, devices=(cpu_device(4 * GIB, 6e9),))
    fetches(cluster, "d", Fetched())
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is Verdict.PLANNING and "it fits nowhere else" in answer.message


@pytest.mark.parametrize(("bandwidth", "fetched"), [(20e9, False), (25e9, False), (400e9, True)])
async def test_a_machine_that_holds_it_alone_gives_it_away_to_a_far_quicker_one_only(
    bandwidth: float, fetched: bool
) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    cluster.add("d", 0, devices=(cpu_device(2 * GIB, bandwidth),))
    fetches(cluster, "d", Fetched())
    answer = await cluster.planner.ensure(ASK)
    assert answer.verdict is (Verdict.PLANNING if fetched else Verdict.WAIT)
    assert len(cluster.asked("fetch")) == fetched
