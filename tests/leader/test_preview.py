"""Previews of models without a file, from their profiles in the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.leader.messages import Ensure, Verdict
from sollold.leader.preview import outline_from_profile
from sollold.placement.request import memory_needed, profile_of
from sollold.settings.schema import GIB, MIB, ModelProfile, ModelSettings, PlacementSettings, Settings
from tests.leader.cluster import Cluster, cpu_device, model

SETTINGS = Settings(placement=PlacementSettings(spare=0.0))


def records(*rooms: int) -> list[Record]:
    return [
        Record(name, f"host-{name}", 1, (), 1, 2, "0", devices=(cpu_device(room * GIB),))
        for name, room in zip("abc", rooms, strict=False)
    ]


def test_a_profile_is_found_by_any_spelling_of_the_name() -> None:
    profiles = {"Llama3.1:405b": ModelProfile(405.0), "demo": ModelProfile(1.0)}
    assert profile_of(profiles, "llama3.1:405B") == ModelProfile(405.0)
    assert profile_of(profiles, "demo:latest") == ModelProfile(1.0)
    assert profile_of(profiles, "other") is None
    assert memory_needed(ModelProfile(10.0)) == 7 * 10**9
    assert memory_needed(ModelProfile(10.0, memory=5)) == 5


@pytest.mark.parametrize(
    ("profile", "rooms", "ok", "words"),
    [
        (ModelProfile(memory=20 * GIB), (8, 24, 16), True, "host-b could hold it alone"),
        (ModelProfile(memory=20 * GIB), (8, 12, 16), True, "spread over host-c, host-b, since no machine"),
        (ModelProfile(memory=4 * GIB, requires_distributed=True), (8, 12, 16), True, "settings require it"),
        (ModelProfile(memory=4 * GIB, requires_distributed=True), (8,), False, "there is no other machine"),
        (ModelProfile(memory=40 * GIB), (8, 12, 16), False, "36.0 GiB available, 4.00 GiB missing"),
        (ModelProfile(parameters=70.0), (8, 12), False, "70 billion weights, about"),
    ],
)
def test_the_outline_names_the_machines_or_the_missing_memory(
    profile: ModelProfile, rooms: tuple[int, ...], ok: bool, words: str
) -> None:
    outline = outline_from_profile("big:1t", profile, records(*rooms), SETTINGS)
    assert outline.ok is ok and words in outline.message, outline.message
    assert "No node has the file of big:1t yet" in outline.message
    assert (outline.missing is None) is ok


def test_outlines_follow_the_distribution_settings() -> None:
    small = ModelProfile(parameters=8.0)
    spread = replace(SETTINGS, placement=replace(SETTINGS.placement, distributed_threshold=7.0))
    assert "the settings require it" in outline_from_profile("m", small, records(24, 24), spread).message
    never = replace(spread, placement=replace(spread.placement, enable_distributed=False))
    assert "alone" in outline_from_profile("m", small, records(24, 24), never).message
    assert not outline_from_profile("m", ModelProfile(memory=30 * GIB), records(24, 24), never).ok


@pytest.mark.parametrize(
    ("profile", "node"),
    [
        (ModelProfile(memory=GIB), "a"),
        (ModelProfile(memory=4 * GIB), "b"),
        (ModelProfile(memory=GIB, requires_distributed=True), ""),
    ],
)
async def test_without_a_header_the_profile_decides_which_ollama_fits(
    profile: ModelProfile, node: str
) -> None:
    cluster = Cluster(replace(SETTINGS, models=ModelSettings(profiles={"demo": profile})))
    cluster.shapes.clear()
    for name, room, speed in (("a", 2 * GIB, 9.0), ("b", 8 * GIB, 1.0)):
        cluster.add(name, room, model(size=800 * MIB))
        offer = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False)
        cluster.nodes[name].endpoints[offer.id] = replace(offer, speed=speed)
    answer = await cluster.planner.ensure(Ensure("demo"))
    assert answer.verdict is Verdict.USE
    fits = answer.reasons == ("it fits in Ollama there",)
    assert (answer.node if fits else "") == node
