"""Scheduling of periodic work."""

from __future__ import annotations

import asyncio

import pytest

from sollold.turns import pause, sleep_until_set


@pytest.mark.parametrize(
    ("now", "seconds", "then"),
    [
        (10.0, 1.0, 11.0),
        (10.4, 1.0, 11.0),
        (10.6, 1.0, 12.0),
        (10.9995, 1.0, 12.0),
        (7.1, 3.0, 9.0),
        (0.0, 0.5, 0.5),
    ],
)
def test_periodic_work_runs_at_multiples_of_its_period(now: float, seconds: float, then: float) -> None:
    assert now + pause(now, seconds) == pytest.approx(then)


async def test_a_pause_ends_early_when_its_event_is_set() -> None:
    event = asyncio.Event()
    await sleep_until_set(event, 0.01)
    asyncio.get_running_loop().call_soon(event.set)
    async with asyncio.timeout(20):
        await sleep_until_set(event, 60)
        await sleep_until_set(event, None)
    await sleep_until_set(event, 0)
