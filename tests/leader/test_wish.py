"""Placement wishes: settings that a request overrides."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, Placed, State
from sollold.engines.commands import Deploy
from sollold.leader import draft_models
from sollold.leader.messages import Ensure, Verdict
from sollold.leader.wish import PlacementWish
from sollold.machine.device import Device, Kind
from sollold.models.footprint.shape import Shape
from sollold.models.model import Model
from sollold.placement.plan import Plan
from sollold.settings.schema import PlacementSettings
from tests.leader.cluster import ENSURE, SETTINGS, Cluster, cpu_device, load, model
from tests.placement.fleets import GIB, MIB, shape

EXTERNAL = "10.0.0.9:50052"


def with_wish(**wish: Any) -> Ensure:
    return replace(ENSURE, placement=PlacementWish(**wish))


def plan_of(cluster: Cluster) -> Plan:
    order = cluster.requests("deploy")[-1][1]
    assert isinstance(order, Deploy)
    return order.plan


async def start_cluster(*rooms: int, **devices: tuple[Device, ...]) -> Cluster:
    """Start a cluster of machines ``a``, ``b`` …; the first has the model."""
    cluster = Cluster(SETTINGS)
    for name, room in zip("abcd", rooms, strict=False):
        cluster.add(name, room, *([model()] if name == "a" else []), devices=devices.get(name, ()))
    await cluster.planner.start()
    return cluster


async def test_the_number_of_workers_can_be_limited() -> None:
    cluster = await start_cluster(450 * MIB, 450 * MIB, 450 * MIB)
    answer = await cluster.planner.ensure(with_wish(workers=1))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    answer = await cluster.planner.ensure(with_wish(workers=2))
    assert answer.verdict is Verdict.WAIT
    assert len(plan_of(cluster).bytes_by_owner()) == 3
    await cluster.planner.close()


async def test_the_drafting_method_can_be_chosen() -> None:
    cluster = await start_cluster(2 * GIB)
    answer = await cluster.planner.ensure(with_wish(speculation="ngram"))
    assert (plan_of(cluster).drafts_by, plan_of(cluster).asked.speculation) == ("ngram", "ngram")
    cluster.ready(answer.deployment)
    assert (await cluster.planner.ensure(ENSURE)).verdict is Verdict.USE, (
        "a request without a choice uses any deployment"
    )
    assert (await cluster.planner.ensure(with_wish(speculation="ngram"))).verdict is Verdict.USE
    assert (await cluster.planner.ensure(with_wish(speculation="off"))).verdict is Verdict.WAIT
    assert not plan_of(cluster).drafts_by
    await cluster.planner.close()


async def test_a_draft_model_needs_the_same_vocabulary() -> None:
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    other = model("other:latest", "d3", parameters=10_000_000, vocabulary="3000:y")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small, other)
    cluster.shapes |= {"d2": shape(layers=2, layer_bytes=MIB), "d3": shape(layers=2, layer_bytes=MIB)}
    await cluster.planner.start()
    assert (await cluster.planner.ensure(with_wish(speculation="small"))).verdict is Verdict.WAIT
    plan = plan_of(cluster)
    assert (plan.drafts_by, plan.draft_digest, plan.draft_device) == ("small:latest", "d2", "CPU")
    preview = await cluster.planner.preview(with_wish(speculation="other"))
    assert preview.plan is not None and "different vocabulary" in " ".join(preview.plan.reasons)
    await cluster.planner.close()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("wanted", ["off", "auto", "nobody", "other", "demo", "sees"])
async def test_a_deployment_is_not_reloaded_if_its_drafting_would_not_change(wanted: str, busy: bool) -> None:
    cluster = Cluster(SETTINGS)
    other = model("other:latest", "d3", parameters=10_000_000, vocabulary="3000:y")
    sees = replace(other, name="sees:latest", digest="d4", vocabulary="3000:x", projector="p.gguf")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), other, sees)
    await cluster.planner.start()
    await load(cluster, idle=0.0 if busy else 3.0, active=int(busy))
    for _ in range(2):
        assert (await cluster.planner.ensure(with_wish(speculation=wanted))).verdict is Verdict.USE
    await cluster.planner.close()


async def test_a_draft_model_that_is_added_later_is_used_on_request() -> None:
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"))
    cluster.shapes["d2"] = shape(layers=2, layer_bytes=MIB)
    await cluster.planner.start()
    await load(cluster, with_wish(speculation="small"), idle=3.0)
    assert not plan_of(cluster).drafts_by
    cluster.nodes["a"].models.append(small)
    answer = await cluster.planner.ensure(with_wish(speculation="small"))
    assert answer.verdict is Verdict.WAIT and plan_of(cluster).drafts_by == "small:latest"
    cluster.ready(answer.deployment, idle=3.0)
    for equivalent in ("small", "small:latest", "nobody", ""):
        assert (await cluster.planner.ensure(with_wish(speculation=equivalent))).verdict is Verdict.USE
    cluster.ready(answer.deployment, active=1)
    assert (await cluster.planner.ensure(with_wish(speculation="auto"))).verdict is Verdict.USE
    cluster.ready(answer.deployment, active=0, idle=3.0)
    assert (await cluster.planner.ensure(with_wish(speculation="auto"))).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_a_named_draft_model_stays_when_more_context_is_needed() -> None:
    cluster = Cluster(SETTINGS)
    # As large as the model, so it is only used when it is named.
    small = model("small:latest", "d2", vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small)
    cluster.shapes["d2"] = shape(layers=2, layer_bytes=MIB)
    await cluster.planner.start()
    await load(cluster, with_wish(speculation="small"), idle=3.0)
    answer = await cluster.planner.ensure(replace(ENSURE, context=4096))
    assert answer.verdict is Verdict.WAIT
    plan = plan_of(cluster)
    assert plan.run.request_context >= 4096 and plan.drafts_by == "small:latest"
    await cluster.planner.close()


async def test_a_draft_setting_without_a_model_is_reported() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model(), model("small:latest", "d2"))
    library: Any = cluster
    for valid in ("auto", "OFF", "mtp", "ngram", "small", "Small:latest"):
        assert draft_models.missing_drafter(library, valid) == ""
    assert "model 'smal' not found" in draft_models.missing_drafter(library, "smal")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("nobody", "model 'nobody' not found"),
        ("other", "other:latest has a different vocabulary from demo:latest"),
        ("demo", "demo:latest is the model itself"),
        ("adapted", "adapted:latest has adapters, and such models can't draft"),
        ("embeds", "embeds:latest only makes embeddings"),
        ("broken", "broken:latest can't be run here: a shard is missing"),
    ],
)
async def test_a_plan_states_why_a_model_cannot_draft(wanted: str, reason: str) -> None:
    cluster = Cluster(SETTINGS)
    fit = model("fit:latest", "d9", parameters=10_000_000, vocabulary="3000:x")
    others = (
        replace(fit, name="other:latest", digest="d2", vocabulary="3000:y"),
        replace(fit, name="adapted:latest", digest="d3", adapters=("lora.gguf",)),
        replace(fit, name="embeds:latest", digest="d4", capabilities=("embedding",)),
        replace(fit, name="broken:latest", digest="d5", unusable="a shard is missing."),
    )
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), *others)
    await cluster.planner.start()
    preview = await cluster.planner.preview(with_wish(speculation=wanted))
    assert preview.plan is not None and preview.plan.reasons[-1] == f"No tokens are drafted: {reason}."
    await cluster.planner.close()


async def test_a_node_that_does_not_return_shapes_delays_no_placement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_models, "SHAPES_SECONDS", 0.01)
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small)
    cluster.add("b", 2 * GIB)

    async def hanging_shape(node: str, model: Model) -> Shape:
        if model.digest == "d2":
            await asyncio.Event().wait()
        return cluster.shapes[model.digest]

    monkeypatch.setattr(cluster, "shape", hanging_shape)
    await cluster.planner.start()
    assert (await cluster.planner.ensure(with_wish(speculation="auto"))).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_distribution_can_be_disabled() -> None:
    cluster = await start_cluster(450 * MIB, 450 * MIB, 450 * MIB)
    answer = await cluster.planner.ensure(with_wish(distributed=False))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert "not spread over machines" in answer.message
    await cluster.planner.close()


async def test_a_threshold_spreads_a_model_that_fits_one_machine() -> None:
    cluster = await start_cluster(2 * GIB, 2 * GIB)
    alone = await load(cluster, idle=3.0)
    assert set(plan_of(cluster).bytes_by_owner()) == {"a"}
    answer = await cluster.planner.ensure(with_wish(threshold=0.1))
    assert answer.verdict is Verdict.WAIT and answer.deployment != alone
    assert set(plan_of(cluster).bytes_by_owner()) == {"a", "b"}
    cluster.ready(answer.deployment, idle=3.0)
    for again in (with_wish(threshold=0.1), with_wish(threshold=0.0), with_wish(workers=1), ENSURE):
        found = await cluster.planner.ensure(again)
        assert (found.verdict, found.deployment) == (Verdict.USE, answer.deployment)
    await cluster.planner.close()


async def test_a_busy_deployment_that_does_not_meet_the_wish_is_refused() -> None:
    cluster = await start_cluster(2 * GIB, 2 * GIB)
    spread = await load(cluster, with_wish(threshold=0.1), active=1)
    answer = await cluster.planner.ensure(with_wish(distributed=False))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
    assert "one machine alone" in answer.message and "in use" in answer.message
    cluster.ready(spread, active=0, idle=3.0)
    answer = await cluster.planner.ensure(with_wish(distributed=False))
    assert answer.verdict is Verdict.WAIT
    assert set(plan_of(cluster).bytes_by_owner()) == {"a"}
    await cluster.planner.close()


async def test_an_unmeetable_threshold_does_not_cause_repeated_loads() -> None:
    cluster = await start_cluster(2 * GIB)
    first = await load(cluster, with_wish(threshold=0.1), idle=3.0)
    again = await cluster.planner.ensure(with_wish(threshold=0.1))
    assert (again.verdict, again.deployment) == (Verdict.USE, first)
    await cluster.planner.close()


@pytest.mark.parametrize(("external", "fits"), [(None, True), ((EXTERNAL,), True), ((), False)])
async def test_external_workers_can_be_excluded(external: tuple[str, ...] | None, fits: bool) -> None:
    room = 2 * GIB
    worker = Device(EXTERNAL, Kind.EXTERNAL, "worker", room, room, room, 0, room, 0, 20e9, 0.2e12)
    cluster = await start_cluster(450 * MIB, a=(cpu_device(450 * MIB), worker))
    answer = await cluster.planner.ensure(with_wish(external=external))
    assert (answer.verdict is Verdict.WAIT) is fits, answer
    await cluster.planner.close()


def test_only_named_options_override_the_settings() -> None:
    settings = PlacementSettings()
    assert PlacementWish().over(settings) == settings
    changed = PlacementWish(0, False, 70.0, "even").over(settings)
    assert changed == replace(
        settings, max_workers=0, enable_distributed=False, distributed_threshold=70.0, policy="even"
    )


def test_the_policy_does_not_matter_on_one_machine() -> None:
    local = Endpoint(
        "d", "m", "", Backend.LOCAL, State.READY, placed=(Placed("a", "CPU", 0, 9, 1),), asked=Asked()
    )
    assert PlacementWish(policy="even").unmet_by(local, sharded=False) == ""
    assert "spread" in PlacementWish(policy="spread").unmet_by(local, sharded=False)
