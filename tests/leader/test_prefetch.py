"""Fetching a model's file to a machine that would run it better."""

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
ENSURE = Ensure("demo")


@pytest.fixture(autouse=True)
def no_fetch_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FETCH_LOOK", 0.0)


def small_machines(settings: Settings = SETTINGS) -> Cluster:
    """Three machines, each too small for the whole model; a has the file."""
    cluster = Cluster(settings)
    for name in "abc":
        cluster.add(name, 450 * MIB, *([model()] if name == "a" else []))
    return cluster


def answer_fetches(cluster: Cluster, node: str, *states: Fetched) -> None:
    """Let the node answer fetch requests with these states in turn; with ``done`` it gets the file."""
    remaining = list(states)

    async def hook(method: str, request: object) -> object | None:
        if method != "fetch":
            return None
        state = remaining.pop(0)
        if state.done:
            cluster.nodes[node].models.append(model(source="own"))
        return state

    cluster.nodes[node].hook = hook


async def test_a_large_machine_fetches_the_file_instead_of_sharing_layers() -> None:
    cluster = small_machines()
    cluster.add("d", 4 * GIB)
    answer_fetches(cluster, "d", Fetched(), Fetched(completed=1, total=4), Fetched(done=True))
    preview = await cluster.planner.preview(ENSURE)
    assert preview.ok and preview.plan is not None and preview.plan.head == "d"
    assert "host-d fetches the file of demo:latest first, 820 MiB" in preview.message
    assert preview.plan is not None and preview.plan.reasons and preview.message not in preview.plan.reasons
    assert cluster.requests("fetch") == [], "a preview fetches nothing"
    first = await cluster.planner.ensure(ENSURE)
    assert (first.verdict, first.deployment) == (Verdict.PLANNING, "")
    assert "25% of it has come" in (await cluster.planner.ensure(ENSURE)).message
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    assert {request for _, request in cluster.requests("fetch")} == {Fetch(cluster.term, "demo:latest", "d1")}
    placed = await cluster.planner.ensure(ENSURE)
    assert (placed.verdict, placed.node) == (Verdict.WAIT, "d")
    ((_, deploy),) = cluster.requests("deploy")
    assert isinstance(deploy, Deploy) and deploy.plan.shares == ()


async def test_a_machine_that_cannot_fetch_is_left_out() -> None:
    cluster = small_machines()
    cluster.add("d", 4 * GIB)
    answer_fetches(cluster, "d", Fetched(failed="its disk has no room to spare"))
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "no room to spare" in answer.message
    assert (await cluster.planner.ensure(ENSURE)).node == "a"
    cluster = small_machines()
    cluster.add("d", 4 * GIB)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING, "d does not know the command"
    assert (await cluster.planner.ensure(ENSURE)).node == "a"


async def test_another_machine_fetches_if_the_only_one_with_the_file_refuses() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 4 * GIB, model()).hook = refuse("the term can't be written")
    cluster.add("b", 4 * GIB)
    answer_fetches(cluster, "b", Fetched(completed=1, total=4), Fetched(done=True))
    assert "25% of it has come" in (await cluster.planner.ensure(ENSURE)).message
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.PLANNING
    placed = await cluster.planner.ensure(ENSURE)
    assert (placed.verdict, placed.node) == (Verdict.WAIT, "b")


@pytest.mark.parametrize(
    ("seconds", "bandwidth"),
    [
        (0.0, 20e9),  # the settings forbid it
        (5.0, 20e9),  # 820 MiB take longer than that over a link of 1 Gb/s
        (300.0, 6e9),  # too slow to compensate for the copy
    ],
)
async def test_the_model_is_distributed_if_fetching_is_disabled_or_too_slow(
    seconds: float, bandwidth: float
) -> None:
    cluster = small_machines(replace(SETTINGS, models=ModelSettings(fetch_seconds=seconds)))
    cluster.add("d", 0, devices=(cpu_device(4 * GIB, bandwidth),))
    answer = await cluster.planner.ensure(ENSURE)
    assert (answer.verdict, answer.node) == (Verdict.WAIT, "a")
    assert cluster.requests("fetch") == []


async def test_a_model_that_fits_only_elsewhere_is_fetched_there() -> None:
    undistributed = replace(SETTINGS.placement, enable_distributed=False)
    cluster = small_machines(replace(SETTINGS, placement=undistributed))
    assert (await cluster.planner.ensure(ENSURE)).fault == "too_big"
    cluster.add("d", 0, devices=(cpu_device(4 * GIB, 6e9),))
    answer_fetches(cluster, "d", Fetched())
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is Verdict.PLANNING and "it fits nowhere else" in answer.message


@pytest.mark.parametrize(("bandwidth", "fetched"), [(20e9, False), (25e9, False), (400e9, True)])
async def test_a_machine_that_fits_the_model_is_left_only_for_a_much_faster_one(
    bandwidth: float, fetched: bool
) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model())
    cluster.add("d", 0, devices=(cpu_device(2 * GIB, bandwidth),))
    answer_fetches(cluster, "d", Fetched())
    answer = await cluster.planner.ensure(ENSURE)
    assert answer.verdict is (Verdict.PLANNING if fetched else Verdict.WAIT)
    assert len(cluster.requests("fetch")) == fetched
