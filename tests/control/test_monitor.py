"""The samples of the history while nothing goes on, and when something does again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sollold.control.history import HistoryRequest
from sollold.control.monitor import Monitor
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
    (mine,) = await monitor.histories(HistoryRequest(60, 1))
    return [value for value in mine.series["tokens_per_second"] if value == value]


async def test_who_reads_gets_the_seconds_in_which_nothing_went_on(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 5  # as if so long had passed
    assert await tokens(monitor) == [0.0] * (before + 5)


async def test_what_is_counted_after_a_rest_is_of_its_own_second(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 5
    monitor.activity.on_begin()
    monitor.activity.tokens += 3
    await until(lambda: monitor.history._count > before + 5)
    assert await tokens(monitor) == [*[0.0] * (before + 5), 3.0]


async def test_no_rest_begins_with_a_second_in_which_something_was_counted(monitor: Monitor) -> None:
    monitor.activity.on_begin()
    monitor.activity.tokens += 3
    await until(lambda: not monitor._resting)
    await until(lambda: monitor._resting)
    monitor._due -= 5
    assert sum(await tokens(monitor)) == 3.0


async def test_this_nodes_record_ends_a_rest(monitor: Monitor, cluster: PlainCluster) -> None:
    cluster.update_me(name="other")
    await until(lambda: monitor._sampled is cluster.me)


async def test_seconds_in_which_the_machine_slept_have_no_samples(monitor: Monitor) -> None:
    before = len(await tokens(monitor))
    monitor._due -= 3600
    assert len(await tokens(monitor)) <= before + 1
