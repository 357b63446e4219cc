"""The verdict of the relay benchmark."""

from __future__ import annotations

import pytest

from tests.bench.relay import Measured, ratios


def test_more_than_1_5_times_nginx_fails() -> None:
    nginx = Measured("nginx", per_token=10.0, took=1.0, first=0.5, worst=1.0, added=0.2, rate=3000.0)
    ours = Measured("sollold", per_token=15.0, took=1.0, first=0.7, worst=1.0, added=0.4, rate=1500.0)
    verdicts = {ratio.quantity: (ratio.value, ratio.met) for ratio in ratios(ours, nginx)}
    assert verdicts == {
        "cpu per token": (1.5, True),
        "added first byte": (pytest.approx(2.0), False),
        "requests/s": (2.0, False),
    }


def test_values_too_small_to_measure_pass() -> None:
    nothing = Measured("nginx", per_token=0.0, took=1.0, first=0.5, worst=1.0, added=-0.01, rate=3000.0)
    assert all(ratio.met for ratio in ratios(nothing, nothing))
