"""The rate limit of transfers."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sollold.models.transfer.download import SourceError, Stop
from sollold.models.transfer.rate_limit import RateLimit


def test_waits_follow_from_the_rate() -> None:
    limit = RateLimit(1000)
    assert limit.wait(500, 100.0) == pytest.approx(0.25)
    assert limit.wait(500, 100.0) == pytest.approx(0.75)
    assert limit.wait(10, 200.0) == 0.0
    assert RateLimit(0).wait(1 << 40, 1.0) == 0.0
    limit.rate = 0
    assert limit.wait(1 << 40, 200.0) == 0.0


def test_several_threads_share_the_rate() -> None:
    limit, count = RateLimit(1000), 400
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            waits = list(threads.map(lambda _: limit.wait(10, 100.0), range(count)))
    finally:
        sys.setswitchinterval(before)
    assert max(waits) == pytest.approx(count * 10 / 1000 - 0.25)
    assert len({round(wait, 6) for wait in waits if wait}) == len([wait for wait in waits if wait])


def test_a_low_rate_uses_small_chunks() -> None:
    assert RateLimit(0).piece(1 << 20) == 1 << 20
    assert RateLimit(10 << 20).piece(1 << 20) == 1 << 20
    assert RateLimit(40_000).piece(1 << 20) == 10_000
    assert RateLimit(1).piece(1 << 20) == 1024


def test_a_waiting_thread_can_be_stopped() -> None:
    stop = Stop()
    with ThreadPoolExecutor(1) as threads:
        sleeping = threads.submit(stop.pause, 60.0)
        stop.stop()
        with pytest.raises(SourceError):
            sleeping.result(timeout=10)
