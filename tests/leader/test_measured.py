"""Measured speeds are learnt from the records and kept on disk."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sollold.agent.commands import Deploy
from sollold.cluster.record import Backend, Endpoint, Placed, State
from sollold.leader.ensure import Ensure
from sollold.leader.leader import Leader
from sollold.leader.measured import Measured, terms_of
from tests.leader.cluster import Cluster, model
from tests.leader.test_leader import SETTINGS
from tests.placement.fleets import MIB, shape


async def until_known(measured: Measured) -> None:
    for _ in range(1000):
        if measured.correction("llama")("a", "CPU") != 1.0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was learnt")


async def test_after_one_answer_the_prediction_is_right(tmp_path: Path) -> None:
    town = Cluster(SETTINGS)
    town.add("a", 450 * MIB, model())
    town.add("b", 450 * MIB)
    town.add("c", 450 * MIB)
    path = tmp_path / "speeds.json"
    measured = Measured(town, town, path)
    await measured.start()
    leader = Leader(SETTINGS, town, town, town, measured.correction, clock=lambda: town.now)
    try:
        answer = await leader.ensure(Ensure("demo"))
        plan = next(r.plan for _, r in town.asked("deploy") if isinstance(r, Deploy))
        actual = plan.tokens_per_second / 3
        town.ready(answer.deployment, speed=actual)
        await until_known(measured)
        preview = await leader.preview(Ensure("demo"))
        assert preview.plan is not None
        assert preview.plan.tokens_per_second == pytest.approx(actual, rel=0.25)
    finally:
        await leader.close()
        await measured.close()
    again = Measured(town, town, path)
    await again.start()
    assert again.correction("llama")("a", "CPU") == pytest.approx(3.0, rel=0.3)
    await again.close()


async def test_a_spoilt_file_is_begun_anew(tmp_path: Path) -> None:
    town = Cluster(SETTINGS)
    town.add("a", 450 * MIB)
    path = tmp_path / "speeds.json"
    path.write_text("{")
    measured = Measured(town, town, path)
    await measured.start()
    assert measured.correction("llama")("a", "CPU") == 1.0
    await measured.close()
    assert path.read_text() == "{"


def test_nothing_is_learnt_of_layers_that_two_devices_share() -> None:
    town = Cluster(SETTINGS)
    town.add("a", 450 * MIB)
    record = town.record("a")
    assert record is not None
    endpoint = Endpoint(
        "d", "demo", "d1", Backend.LOCAL, State.READY, placed=(Placed("a", "CPU", 0, 17, 100),)
    )
    assert terms_of(record, endpoint, (record,), shape())
    assert terms_of(record, replace(endpoint, cpu_moe=3), (record,), shape()) == ()
