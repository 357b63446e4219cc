"""The limit of what transfers may send."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sollold.models.transfer.download import SourceError, Stop
from sollold.models.transfer.rate_limit import RateLimit


def test_pace() -> None:
    pace = RateLimit(1000)
    assert pace.wait(500, 100.0) == pytest.approx(0.25)
    assert pace.wait(500, 100.0) == pytest.approx(0.75)
    assert pace.wait(10, 200.0) == 0.0
    assert RateLimit(0).wait(1 << 40, 1.0) == 0.0
    pace.rate = 0
    assert pace.wait(1 << 40, 200.0) == 0.0


def test_pace_of_several_threads_is_one_pace() -> None:
    pace, count = RateLimit(1000), 400
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            waits = list(threads.map(lambda _: pace.wait(10, 100.0), range(count)))
    finally:
        sys.setswitchinterval(before)
    assert max(waits) == pytest.approx(count * 10 / 1000 - 0.25)
    assert len({round(wait, 6) for wait in waits if wait}) == len([wait for wait in waits if wait])


def test_slow_pace_moves_small_pieces() -> None:
    assert RateLimit(0).piece(1 << 20) == 1 << 20
    assert RateLimit(10 << 20).piece(1 << 20) == 1 << 20
    assert RateLimit(40_000).piece(1 << 20) == 10_000
    assert RateLimit(1).piece(1 << 20) == 1024


def test_a_thread_that_keeps_a_pace_can_be_stopped() -> None:
    stop = Stop()
    with ThreadPoolExecutor(1) as threads:
        sleeping = threads.submit(stop.pause, 60.0)
        stop.stop()
        with pytest.raises(SourceError):
            sleeping.result(timeout=10)
