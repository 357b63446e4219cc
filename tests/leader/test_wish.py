"""How a caller wants a model placed: the settings overridden for one request."""

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
from tests.leader.cluster import ASK, SETTINGS, Cluster, cpu_device, model, placed
from tests.placement.fleets import GIB, MIB, shape

EXTERNAL = "10.0.0.9:50052"


def wishing(**wish: object) -> Ensure:
    return replace(ASK, placement=PlacementWish(**wish))  # type: ignore[arg-type]


def plan_of(cluster: Cluster) -> Plan:
    order = cluster.asked("deploy")[-1][1]
    assert isinstance(order, Deploy)
    return order.plan


async def started(*rooms: int, **devices: tuple[Device, ...]) -> Cluster:
    """Machines ``a``, ``b`` …, of which the first has the model."""
    cluster = Cluster(SETTINGS)
    for name, room in zip("abcd", rooms, strict=False):
        cluster.add(name, room, *([model()] if name == "a" else []), devices=devices.get(name, ()))
    await cluster.planner.start()
    return cluster


async def test_so_many_workers_at_most() -> None:
    cluster = await started(450 * MIB, 450 * MIB, 450 * MIB)
    answer = await cluster.planner.ensure(wishing(workers=1))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    answer = await cluster.planner.ensure(wishing(workers=2))
    assert answer.verdict is Verdict.WAIT
    assert len(plan_of(cluster).bytes_by_owner()) == 3
    await cluster.planner.close()


async def test_what_drafts_tokens() -> None:
    cluster = await started(2 * GIB)
    answer = await cluster.planner.ensure(wishing(speculation="ngram"))
    assert (plan_of(cluster).drafts_by, plan_of(cluster).asked.speculation) == ("ngram", "ngram")
    cluster.ready(answer.deployment)
    assert (await cluster.planner.ensure(ASK)).verdict is Verdict.USE, (
        "one who names none takes what is there"
    )
    assert (await cluster.planner.ensure(wishing(speculation="ngram"))).verdict is Verdict.USE
    assert (await cluster.planner.ensure(wishing(speculation="off"))).verdict is Verdict.WAIT
    assert not plan_of(cluster).drafts_by
    await cluster.planner.close()


async def test_a_model_with_the_same_vocabulary_drafts() -> None:
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    other = model("other:latest", "d3", parameters=10_000_000, vocabulary="3000:y")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small, other)
    cluster.shapes |= {"d2": shape(layers=2, layer_bytes=MIB), "d3": shape(layers=2, layer_bytes=MIB)}
    await cluster.planner.start()
    assert (await cluster.planner.ensure(wishing(speculation="small"))).verdict is Verdict.WAIT
    plan = plan_of(cluster)
    assert (plan.drafts_by, plan.draft_digest, plan.draft_device) == ("small:latest", "d2", "CPU")
    preview = await cluster.planner.preview(wishing(speculation="other"))
    assert preview.plan is not None and "different vocabulary" in " ".join(preview.plan.reasons)
    await cluster.planner.close()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("wanted", ["off", "auto", "nobody", "other", "demo", "sees"])
async def test_what_would_draft_no_otherwise_is_not_loaded_anew(wanted: str, busy: bool) -> None:
    cluster = Cluster(SETTINGS)
    other = model("other:latest", "d3", parameters=10_000_000, vocabulary="3000:y")
    sees = replace(other, name="sees:latest", digest="d4", vocabulary="3000:x", projector="p.gguf")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), other, sees)
    await cluster.planner.start()
    await placed(cluster, idle=0.0 if busy else 3.0, active=int(busy))
    for _ in range(2):
        assert (await cluster.planner.ensure(wishing(speculation=wanted))).verdict is Verdict.USE
    await cluster.planner.close()


async def test_a_draft_model_that_comes_later_is_used_when_it_is_asked_for_again() -> None:
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"))
    cluster.shapes["d2"] = shape(layers=2, layer_bytes=MIB)
    await cluster.planner.start()
    await placed(cluster, wishing(speculation="small"), idle=3.0)
    assert not plan_of(cluster).drafts_by
    cluster.nodes["a"].models.append(small)
    answer = await cluster.planner.ensure(wishing(speculation="small"))
    assert answer.verdict is Verdict.WAIT and plan_of(cluster).drafts_by == "small:latest"
    cluster.ready(answer.deployment, idle=3.0)
    for same in ("small", "small:latest", "nobody", ""):
        assert (await cluster.planner.ensure(wishing(speculation=same))).verdict is Verdict.USE
    cluster.ready(answer.deployment, active=1)
    assert (await cluster.planner.ensure(wishing(speculation="auto"))).verdict is Verdict.USE
    cluster.ready(answer.deployment, active=0, idle=3.0)
    assert (await cluster.planner.ensure(wishing(speculation="auto"))).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_a_named_draft_model_stays_when_more_context_is_needed() -> None:
    cluster = Cluster(SETTINGS)
    # As large as the model: nobody would choose it who was not told to.
    small = model("small:latest", "d2", vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small)
    cluster.shapes["d2"] = shape(layers=2, layer_bytes=MIB)
    await cluster.planner.start()
    await placed(cluster, wishing(speculation="small"), idle=3.0)
    answer = await cluster.planner.ensure(replace(ASK, context=4096))
    assert answer.verdict is Verdict.WAIT
    plan = plan_of(cluster)
    assert plan.run.request_context >= 4096 and plan.drafts_by == "small:latest"
    await cluster.planner.close()


async def test_a_setting_that_names_no_model_is_found() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 2 * GIB, model(), model("small:latest", "d2"))
    library: Any = cluster
    for right in ("auto", "OFF", "mtp", "ngram", "small", "Small:latest"):
        assert draft_models.missing_drafter(library, right) == ""
    assert "model 'smal' not found" in draft_models.missing_drafter(library, "smal")


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("nobody", "model 'nobody' not found"),
        ("other", "other:latest has a different vocabulary from demo:latest"),
        ("demo", "demo:latest is the model itself"),
        ("adapted", "adapted:latest has adapters, and such models can't draft"),
        ("embeds", "embeds:latest only makes embeddings"),
        ("broken", "broken:latest can't be run here: a shard is missing"),
    ],
)
async def test_a_plan_says_why_a_model_can_not_draft(wanted: str, why: str) -> None:
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
    preview = await cluster.planner.preview(wishing(speculation=wanted))
    assert preview.plan is not None and preview.plan.reasons[-1] == f"No tokens are drafted: {why}."
    await cluster.planner.close()


async def test_a_node_that_does_not_tell_of_its_models_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_models, "SHAPES_SECONDS", 0.01)
    cluster = Cluster(SETTINGS)
    small = model("small:latest", "d2", parameters=10_000_000, vocabulary="3000:x")
    cluster.add("a", 2 * GIB, model(vocabulary="3000:x"), small)
    cluster.add("b", 2 * GIB)

    async def never(node: str, one: Model) -> Shape:
        if one.digest == "d2":
            await asyncio.Event().wait()
        return cluster.shapes[one.digest]

    monkeypatch.setattr(cluster, "shape", never)
    await cluster.planner.start()
    assert (await cluster.planner.ensure(wishing(speculation="auto"))).verdict is Verdict.WAIT
    await cluster.planner.close()


async def test_one_machine_alone() -> None:
    cluster = await started(450 * MIB, 450 * MIB, 450 * MIB)
    answer = await cluster.planner.ensure(wishing(distributed=False))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "too_big")
    assert "not spread over machines" in answer.message
    await cluster.planner.close()


async def test_a_threshold_spreads_a_model_that_one_machine_holds_and_is_kept_to() -> None:
    cluster = await started(2 * GIB, 2 * GIB)
    alone = await placed(cluster, idle=3.0)
    assert set(plan_of(cluster).bytes_by_owner()) == {"a"}
    answer = await cluster.planner.ensure(wishing(threshold=0.1))
    assert answer.verdict is Verdict.WAIT and answer.deployment != alone
    assert set(plan_of(cluster).bytes_by_owner()) == {"a", "b"}
    cluster.ready(answer.deployment, idle=3.0)
    for again in (wishing(threshold=0.1), wishing(threshold=0.0), wishing(workers=1), ASK):
        found = await cluster.planner.ensure(again)
        assert (found.verdict, found.deployment) == (Verdict.USE, answer.deployment)
    await cluster.planner.close()


async def test_what_runs_otherwise_and_is_in_use_is_not_used() -> None:
    cluster = await started(2 * GIB, 2 * GIB)
    spread = await placed(cluster, wishing(threshold=0.1), active=1)
    answer = await cluster.planner.ensure(wishing(distributed=False))
    assert (answer.verdict, answer.fault) == (Verdict.REFUSED, "unavailable")
    assert "one machine alone" in answer.message and "in use" in answer.message
    cluster.ready(spread, active=0, idle=3.0)
    answer = await cluster.planner.ensure(wishing(distributed=False))
    assert answer.verdict is Verdict.WAIT
    assert set(plan_of(cluster).bytes_by_owner()) == {"a"}
    await cluster.planner.close()


async def test_where_no_other_machine_is_a_threshold_is_no_reason_to_load_again_and_again() -> None:
    cluster = await started(2 * GIB)
    first = await placed(cluster, wishing(threshold=0.1), idle=3.0)
    again = await cluster.planner.ensure(wishing(threshold=0.1))
    assert (again.verdict, again.deployment) == (Verdict.USE, first)
    await cluster.planner.close()


@pytest.mark.parametrize(("external", "fits"), [(None, True), ((EXTERNAL,), True), ((), False)])
async def test_external_workers_only_where_they_are_wanted(
    external: tuple[str, ...] | None, fits: bool
) -> None:
    room = 2 * GIB
    worker = Device(EXTERNAL, Kind.EXTERNAL, "worker", room, room, room, 0, room, 0, 20e9, 0.2e12)
    cluster = await started(450 * MIB, a=(cpu_device(450 * MIB), worker))
    answer = await cluster.planner.ensure(wishing(external=external))
    assert (answer.verdict is Verdict.WAIT) is fits, answer
    await cluster.planner.close()


def test_the_settings_are_overridden_where_something_is_named() -> None:
    settings = PlacementSettings()
    assert PlacementWish().over(settings) == settings
    changed = PlacementWish(0, False, 70.0, "even").over(settings)
    assert changed == replace(
        settings, max_workers=0, enable_distributed=False, distributed_threshold=70.0, policy="even"
    )


def test_how_layers_are_shared_out_does_not_matter_on_one_machine() -> None:
    local = Endpoint(
        "d", "m", "", Backend.LOCAL, State.READY, placed=(Placed("a", "CPU", 0, 9, 1),), asked=Asked()
    )
    assert PlacementWish(policy="even").unmet_by(local, sharded=False) == ""
    assert "spread" in PlacementWish(policy="spread").unmet_by(local, sharded=False)
