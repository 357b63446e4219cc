"""Dictionaries of limited size."""

from __future__ import annotations

from sollold.bounded import BoundedDict


def test_the_entries_set_last_are_kept() -> None:
    entries: BoundedDict[str, int] = BoundedDict(2)
    entries["a"], entries["b"], entries["a"], entries["c"] = 1, 2, 3, 4
    assert list(entries.items()) == [("a", 3), ("c", 4)]
