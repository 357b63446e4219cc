"""Measured speeds are learned from the records and saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import Backend, Drafts, Endpoint, Placed, State
from sollold.engines.commands import Deploy
from sollold.leader.leader import Leader
from sollold.leader.messages import Ensure
from sollold.leader.speed_calibration import SpeedCalibration, terms_of
from tests.doubles import until
from tests.leader.cluster import SETTINGS, Cluster, model
from tests.placement.fleets import MIB, shape


async def test_one_measurement_corrects_the_prediction(tmp_path: Path) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB, model())
    cluster.add("b", 450 * MIB)
    cluster.add("c", 450 * MIB)
    path = tmp_path / "speeds.json"
    calibration = SpeedCalibration(cluster, cluster, path)
    await calibration.start()
    leader = Leader(SETTINGS, cluster, cluster, cluster, calibration.correction, clock=lambda: cluster.now)
    try:
        answer = await leader.ensure(Ensure("demo"))
        plan = next(r.plan for _, r in cluster.requests("deploy") if isinstance(r, Deploy))
        actual = plan.tokens_per_second / 3
        cluster.ready(answer.deployment, speed=actual)
        await until(lambda: calibration.correction("llama")("a", "CPU") != 1.0)
        preview = await leader.preview(Ensure("demo"))
        assert preview.plan is not None
        assert preview.plan.tokens_per_second == pytest.approx(actual, rel=0.25)
    finally:
        await leader.close()
        await calibration.close()
    restored = SpeedCalibration(cluster, cluster, path)
    await restored.start()
    assert restored.correction("llama")("a", "CPU") == pytest.approx(3.0, rel=0.3)
    await restored.close()


@pytest.mark.parametrize(("by", "digest"), [("small:latest", "d2"), ("mtp", "")])
async def test_draft_statistics_are_learned_and_saved(tmp_path: Path, by: str, digest: str) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB, model())
    path = tmp_path / "speeds.json"
    calibration = SpeedCalibration(cluster, cluster, path)
    await calibration.start()
    drafts = Drafts(by, 4, tokens=1000, drafted=400, accepted=300, digest=digest)
    cluster.nodes["a"].endpoints["x"] = Endpoint(
        "x", "demo:latest", "d1", Backend.SHARDED, State.READY, speed=9.0, drafts=drafts
    )
    cluster.changed()
    await until(lambda: calibration.draft_stats("d1")(digest or by) is not None)
    await calibration.close()
    assert calibration.correction("llama")("a", "CPU") == 1.0, "drafts hide the speed of the devices"
    restored = SpeedCalibration(cluster, cluster, path)
    await restored.start()
    stats = restored.draft_stats("d1")(digest or by)
    assert stats is not None and stats.acceptance > 0.7 and restored.draft_stats("d1")("ngram") is None
    await restored.close()


@pytest.mark.parametrize("damage", [b"{", b'[{"node": "\xff"}]'])
async def test_a_damaged_file_is_ignored(tmp_path: Path, damage: bytes) -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB)
    path = tmp_path / "speeds.json"
    path.write_bytes(damage)
    calibration = SpeedCalibration(cluster, cluster, path)
    await calibration.start()
    assert calibration.correction("llama")("a", "CPU") == 1.0
    await calibration.close()
    assert path.read_bytes() == damage


def test_layers_split_between_devices_teach_no_speed() -> None:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB)
    record = cluster.record("a")
    assert record is not None
    endpoint = Endpoint(
        "d", "demo", "d1", Backend.LOCAL, State.READY, placed=(Placed("a", "CPU", 0, 17, 100),)
    )
    assert terms_of(record, endpoint, (record,), shape())
    assert terms_of(record, replace(endpoint, cpu_moe=3), (record,), shape()) == ()
