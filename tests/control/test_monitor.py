"""Samples of the history during and after idle periods."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest

from sollold.control.history import HistoryRequest
from sollold.control.monitor import Monitor
from sollold.machine.gpus import GpuLoad
from tests.api.api_parts import PlainCluster, monitor_of
from tests.doubles import until


@pytest.fixture
def cluster() -> PlainCluster:
    return PlainCluster()


@pytest.fixture
async def monitor(cluster: PlainCluster) -> AsyncIterator[Monitor]:
    made = monitor_of(cluster)
    await made.start()
    await until(lambda: made._resting)
    yield made
    await made.close()


async def tokens(monitor: Monitor) -> list[float]:
    (own,) = await monitor.histories(HistoryRequest(60, 1))
    return [value for value in own.series["tokens_per_second"] if value == value]


async def test_reading_fills_in_the_idle_seconds(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 5  # simulates that 5 s have passed
    assert await tokens(monitor) == [0.0] * (before + 5)


async def test_counts_after_an_idle_period_belong_to_their_second(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 5
    monitor.activity.on_begin()
    monitor.activity.tokens += 3
    await until(lambda: monitor.history._count > before + 5)
    assert await tokens(monitor) == [*[0.0] * (before + 5), 3.0]


async def test_an_idle_period_begins_after_the_last_counted_second(monitor: Monitor) -> None:
    monitor.activity.on_begin()
    monitor.activity.tokens += 3
    await until(lambda: not monitor._resting)
    await until(lambda: monitor._resting)
    monitor._due -= 5
    assert sum(await tokens(monitor)) == 3.0


async def test_a_change_of_the_own_record_ends_an_idle_period(
    monitor: Monitor, cluster: PlainCluster
) -> None:
    cluster.update_me(name="other")
    await until(lambda: monitor._sampled is cluster.me)


async def test_a_driver_that_hangs_or_fails_does_not_end_the_history(cluster: PlainCluster) -> None:
    answering = threading.Event()
    reads = 0

    def loads() -> list[GpuLoad]:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise RuntimeError("the driver was unloaded")
        answering.wait(30)
        return [GpuLoad("CUDA0", 0.5, 60.0, 100.0)]

    monitor = monitor_of(cluster, gpus=loads)
    await monitor.start()
    try:
        await until(lambda: reads == 2, 10)
        before = monitor.history._count
        await until(lambda: monitor.history._count > before, 10)
        answering.set()
        await until(lambda: monitor.gpu_loads)
    finally:
        answering.set()
        await monitor.close()


async def test_seconds_of_suspended_time_have_no_samples(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 3600
    assert len(await tokens(monitor)) <= before + 1
