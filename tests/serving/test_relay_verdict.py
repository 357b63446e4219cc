"""The verdict of the relay's benchmark is reckoned from its numbers."""

from __future__ import annotations

import pytest

from tests.bench.relay import Measured, ratios


def test_more_than_one_and_a_half_times_nginx_is_missed() -> None:
    nginx = Measured("nginx", per_token=10.0, took=1.0, first=0.5, worst=1.0, added=0.2, rate=3000.0)
    ours = Measured("sollold", per_token=15.0, took=1.0, first=0.7, worst=1.0, added=0.4, rate=1500.0)
    told = {one.what: (one.value, one.kept) for one in ratios(ours, nginx)}
    assert told == {
        "cpu per token": (1.5, True),
        "added first byte": (pytest.approx(2.0), False),
        "requests/s": (2.0, False),
    }


def test_what_is_too_little_to_measure_is_no_fault() -> None:
    nothing = Measured("nginx", per_token=0.0, took=1.0, first=0.5, worst=1.0, added=-0.01, rate=3000.0)
    assert all(one.kept for one in ratios(nothing, nothing))
