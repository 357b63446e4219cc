"""sollold's dataclasses behave as those of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import FrozenInstanceError, field, fields, replace
from typing import Any

import msgspec
import pytest

from sollold.facts import GUARD, dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """A frozen dataclass."""

    x: int
    y: float = 0.5
    seen: list[int] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Named(Point):
    """A subclass with a further field."""

    name: str = ""


@dataclass(slots=True)
class Count:
    """A mutable dataclass."""

    number: int = 0
    next: Count | None = None


@dataclass(frozen=True, slots=True)
class Own:
    """A dataclass with its own ``__eq__`` and ``__hash__``."""

    x: int
    y: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and other.x == self.x

    def __hash__(self) -> int:
        return hash(self.x)


def test_facts_compare_by_their_fields_and_their_class() -> None:
    fields: object = (1, 0.5)
    assert Point(1) == Point(1, 0.5, [7]) != Point(2) and Point(1) != Named(1) and Point(1) != fields
    assert {Point(1), Point(1, seen=[3]), Named(1), Named(1, name="a")} == {
        Named(1),
        Point(1),
        Named(1, 0.5, [], "a"),
    }
    assert hash(Point(3)) == hash((3, 0.5))
    assert Own(1, 2) == Own(1, 3) and len({Own(1, 2), Own(1, 3)}) == 1
    assert Count(1) == Count(1) != Count(2)
    with pytest.raises(TypeError, match="unhashable"):
        hash(Count())


def test_assignments_to_facts_are_refused() -> None:
    point: Any = Point(1)
    with pytest.raises(FrozenInstanceError, match="'x'"):
        point.x = 2
    with pytest.raises(FrozenInstanceError):
        del point.x
    with pytest.raises(FrozenInstanceError):
        point.other = 2
    assert replace(point, x=2) == Point(2)
    assert [item.name for item in fields(Named)] == ["x", "y", "seen", "name"]
    count = Count()
    count.number += 1
    assert count == Count(1) and not hasattr(count, "__dict__") and not hasattr(point, "__dict__")


def test_facts_behave_the_same_without_the_guard() -> None:
    """Without the guard only assignments differ: comparison, hash, repr and serialization stay the same."""
    code = (
        "from tests.test_facts import *\n"
        "for test in (test_facts_compare_by_their_fields_and_their_class, test_facts_show_their_fields,\n"
        "             test_facts_can_be_copied_and_sent): test()\n"
        "point = Point(1)\n"
        "assert Point.__setattr__ is object.__setattr__ and hash(point) == hash(Point(1))"
    )
    environment = {name: value for name, value in os.environ.items() if name != GUARD}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_facts_show_their_fields() -> None:
    assert repr(Named(1, name="a")) == "Named(x=1, y=0.5, name='a')"
    cyclic = Count(1)
    cyclic.next = cyclic
    assert repr(cyclic) == "Count(number=1, next=...)"


def test_facts_can_be_copied_and_sent() -> None:
    point = Named(1, name="a", seen=[4])
    for duplicate in (copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert duplicate == point and duplicate.seen == [4]
    assert msgspec.json.decode(msgspec.json.encode(point), type=Named) == point
    assert dataclasses.asdict(point) == {"x": 1, "y": 0.5, "seen": [4], "name": "a"}


def test_the_original_class_without_slots_is_released() -> None:
    class Made:
        """Made into a fact."""

        x: int

    first = weakref.ref(Made)
    Made = dataclass(frozen=True, slots=True)(Made)  # type: ignore[misc]
    gc.collect()
    assert first() is None and Made(3) == Made(3)  # type: ignore[call-arg]
