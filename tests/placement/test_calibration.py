"""Predictions follow what real answers show."""

from __future__ import annotations

import random

import pytest

from sollold.placement.calibration import LIMIT, Calibration, Factor, TimePart


def test_one_answer_makes_the_prediction_right() -> None:
    feedback = Calibration()
    terms = [TimePart("a", "CPU", 0.030), TimePart("b", "CPU", 0.020), TimePart("b", "hop", 0.001)]
    feedback.measured("llama", terms, 0.102)
    predicted = sum(t.seconds * feedback.correction("llama")(t.node, t.device) for t in terms)
    assert predicted == pytest.approx(0.102)
    # Another architecture on the same devices profits, and other devices of the sort.
    assert feedback.correction("qwen3")("a", "CPU") == pytest.approx(2.0)
    assert feedback.correction("llama")("c", "CPU") == pytest.approx(2.0)
    assert feedback.correction("llama")("c", "CUDA0") == 1.0


def test_it_settles_among_noisy_answers() -> None:
    dice = random.Random(1)
    feedback = Calibration()
    terms = [TimePart("a", "CUDA0", 0.01)]
    for _ in range(50):
        feedback.measured("llama", terms, 0.015 * dice.uniform(0.9, 1.1))
    assert feedback.correction("llama")("a", "CUDA0") == pytest.approx(1.5, rel=0.1)


def test_nonsense_is_kept_out() -> None:
    feedback = Calibration([Factor("a", "CPU", "llama", float("nan")), Factor("b", "CPU", "llama", 1e9)])
    assert feedback.factors() == ()
    feedback.measured("llama", [TimePart("a", "CPU", 0.01)], float("inf"))
    feedback.measured("llama", [TimePart("a", "CPU", 0.01)], -1.0)
    feedback.measured("llama", [], 1.0)
    assert feedback.factors() == ()
    feedback.measured("llama", [TimePart("a", "CPU", 1e-9)], 100.0)
    feedback.measured("llama", [TimePart("a", "CPU", 1.0)], 1.0 / (2 * LIMIT))
    assert feedback.factors() == ()


def test_it_is_the_same_after_being_kept() -> None:
    feedback = Calibration()
    feedback.measured("llama", [TimePart("a", "CPU", 0.01)], 0.02)
    assert Calibration(feedback.factors()).correction("llama")("a", "CPU") == pytest.approx(2.0)
