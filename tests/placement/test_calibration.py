"""Calibration of predicted times by measured ones."""

from __future__ import annotations

import random

import pytest

from sollold.placement.calibration import LIMIT, Calibration, Factor, TimePart


def test_one_measurement_corrects_the_prediction() -> None:
    calibration = Calibration()
    terms = [TimePart("a", "CPU", 0.030), TimePart("b", "CPU", 0.020), TimePart("b", "hop", 0.001)]
    calibration.measured("llama", terms, 0.102)
    predicted = sum(t.seconds * calibration.correction("llama")(t.node, t.device) for t in terms)
    assert predicted == pytest.approx(0.102)
    # The factor also applies to other architectures and to other devices of the same kind.
    assert calibration.correction("qwen3")("a", "CPU") == pytest.approx(2.0)
    assert calibration.correction("llama")("c", "CPU") == pytest.approx(2.0)
    assert calibration.correction("llama")("c", "CUDA0") == 1.0


def test_the_factor_converges_with_noisy_measurements() -> None:
    rng = random.Random(1)
    calibration = Calibration()
    terms = [TimePart("a", "CUDA0", 0.01)]
    for _ in range(50):
        calibration.measured("llama", terms, 0.015 * rng.uniform(0.9, 1.1))
    assert calibration.correction("llama")("a", "CUDA0") == pytest.approx(1.5, rel=0.1)


def test_implausible_measurements_and_factors_are_ignored() -> None:
    calibration = Calibration([Factor("a", "CPU", "llama", float("nan")), Factor("b", "CPU", "llama", 1e9)])
    assert calibration.factors() == ()
    calibration.measured("llama", [TimePart("a", "CPU", 0.01)], float("inf"))
    calibration.measured("llama", [TimePart("a", "CPU", 0.01)], -1.0)
    calibration.measured("llama", [], 1.0)
    assert calibration.factors() == ()
    calibration.measured("llama", [TimePart("a", "CPU", 1e-9)], 100.0)
    calibration.measured("llama", [TimePart("a", "CPU", 1.0)], 1.0 / (2 * LIMIT))
    assert calibration.factors() == ()


def test_factors_can_be_saved_and_restored() -> None:
    calibration = Calibration()
    calibration.measured("llama", [TimePart("a", "CPU", 0.01)], 0.02)
    assert Calibration(calibration.factors()).correction("llama")("a", "CPU") == pytest.approx(2.0)
