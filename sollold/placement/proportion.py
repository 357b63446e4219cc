"""Layers in proportion: the least fullness that holds the model, for devices in a given order.

Whatever is shared out (bytes against room, or plain counts), the fairest contiguous split is the one
whose fullest device is the least full. It is found by halving: for a fullness, filling each device in
turn as far as it goes tells whether it is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for layers on a device; ``last``: when it holds the output too."""

    middle: int
    last: int


def by_room(memory: Sequence[int], rooms: Sequence[Room]) -> list[tuple[int, int]] | None:
    """Runs with bytes in proportion to the rooms; None when it does not fit. Runs may be empty."""
    low, high = 0.0, 1.0
    best = _fill(memory, rooms, 1.0, len(memory))
    if best is None:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        runs = _fill(memory, rooms, middle, len(memory))
        if runs is None:
            low = middle
        else:
            best, high = runs, middle
    return best


def by_count(memory: Sequence[int], rooms: Sequence[Room]) -> list[tuple[int, int]] | None:
    """Runs of layers as equal in number as fits; None when it does not fit. Runs may be empty."""
    low, high = 1, len(memory)
    best = _fill(memory, rooms, 1.0, high)
    while low < high and best is not None:
        middle = (low + high) // 2
        runs = _fill(memory, rooms, 1.0, middle)
        if runs is None:
            low = middle + 1
        else:
            best, high = runs, middle
    return best


def _fill(
    memory: Sequence[int], rooms: Sequence[Room], fullness: float, count: int
) -> list[tuple[int, int]] | None:
    total = len(memory)
    sums = [0, *accumulate(memory)]
    runs = []
    at = 0
    for index, room in enumerate(rooms):
        # A device that could end the model does, if all that is left fits.
        if total - at <= count and sums[total] - sums[at] <= room.last * fullness:
            runs.append((at, total))
            runs += [(total, total)] * (len(rooms) - index - 1)
            return runs
        end = at
        while end < total - 1 and end - at < count and sums[end + 1] - sums[at] <= room.middle * fullness:
            end += 1
        runs.append((at, end))
        at = end
    return None
