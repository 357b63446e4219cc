"""The time that a load is given."""

from __future__ import annotations

from sollold.engines.llamacpp.load_progress import max_load_seconds
from sollold.models.model import Model


def test_a_large_model_is_given_the_time_that_a_slow_network_needs() -> None:
    model = Model("m:latest", "d" * 64, "folder", ("/m.gguf",), 400 * 10**9, 0.0, layers=61)
    over_a_tenth_of_a_gigabit = model.size / 12e6
    assert max_load_seconds(model) > over_a_tenth_of_a_gigabit
