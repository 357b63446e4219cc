"""Sorting of names with numbers."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sollold.natural_order import natural


def test_numbers_in_names_are_sorted_by_value() -> None:
    names = [
        "Attic",
        "kitchen",
        "pc",
        "pc1",
        "pc2",
        "pc10",
        "pc10b2",
        "pc10b10",
        "rack1-2",
        "rack1-10",
        "rack2",
    ]
    mixed = random.Random(1).sample(names, len(names))
    assert sorted(mixed, key=natural) == names


def test_leading_digits_and_zeros_are_sorted_by_value() -> None:
    assert sorted(["10", "9", "a", "007", "8x"], key=natural) == ["007", "8x", "9", "10", "a"]


@given(st.lists(st.text()))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert len(sorted(names, key=natural)) == len(names)
