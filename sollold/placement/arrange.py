"""Where to cut: the best runs of layers for devices that are given. Seconds and bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

ENOUGH = 0.005
"""How near to the bound of its devices a split must come before better orders are looked for."""


@dataclass(frozen=True, slots=True)
class Bin:
    """A device as the search sees it. Seconds and bytes.

    Attributes:
        rate: per active byte.
        hop: per token when it is used at all.
        tail: more per token when it holds the output.
        room: for layers, when it does not hold the output; ``room_last``: when it does.
        group: of the bins with one group (not -1) at most one is used.
        worker: number of the machine that must run a worker for it; -1: none.
        first: may only hold the first layers, and never the output.
    """

    rate: float
    hop: float
    tail: float
    room: int
    room_last: int
    group: int = -1
    worker: int = -1
    first: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Runs of layers in order: (index of the bin, first, last); the output is the last layer."""

    seconds: float
    runs: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Item:
    """A bin with what was worked out about it.

    Attributes:
        index: of the bin.
        cap: most active bytes that fit in a run.
        low: for each end of a run the first layer with which it still fits.
        low_last: the same for the run that ends the model.
    """

    index: int
    bin: Bin
    cap: float
    low: list[int]
    low_last: int


@dataclass(slots=True)
class Layers:
    """The layers of a model in a row, the output as the last: bytes that each takes, bytes read a token."""

    memory: Sequence[int]
    active: Sequence[int]
    mem: list[int] = field(init=False)
    act: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.mem = [0, *accumulate(self.memory)]
        self.act = [0, *accumulate(self.active)]

    def item(self, index: int, one: Bin) -> Item:
        """What can be said of a bin beforehand."""
        mem, act = self.mem, self.act
        count = len(mem) - 1
        low = [0] * (count + 1)
        start = 0
        cap = 0
        room = one.room
        for end in range(1, count):
            while start < end and mem[end] - mem[start] > room:
                start += 1
            low[end] = start
            if (not one.first or start == 0) and act[end] - act[start] > cap:
                cap = act[end] - act[start]
        low_last = count
        if not one.first:
            while low_last > 0 and mem[count] - mem[low_last - 1] <= one.room_last:
                low_last -= 1
            cap = max(cap, act[count] - act[low_last])
        low[count] = count
        return Item(index, one, float(cap), low, low_last)

    def some_orders(self, head: list[Item], rest: list[Item], bound: float) -> Split | None:
        """Some orders for many devices: few ones last, the others by speed, roomy first, or small first."""
        found: Split | None = None
        keys: list[Callable[[Item], float]] = [
            lambda item: item.bin.rate,
            lambda item: -item.bin.room,
            lambda item: item.bin.room,
        ]
        lasts = sorted(rest, key=lambda item: (item.bin.tail, item.bin.rate))[:2]
        for last in dict.fromkeys(
            (*(id(one) for one in lasts), id(max(rest, key=lambda i: i.bin.room_last)))
        ):
            end = next(item for item in rest if id(item) == last)
            for key in keys:
                others = sorted((item for item in rest if item is not end), key=key)
                split = self.arrange([*head, *others, end])
                if split is not None and (found is None or split.seconds < found.seconds):
                    found = split
                if found is not None and found.seconds <= bound * (1 + ENOUGH):
                    return found
        return found

    def pour(self, order: list[Item]) -> Split | None:
        """Fill all devices but the slowest, from both ends; the slowest gets what is left in between.

        The best there is when layers are alike, and quick.
        """
        mem, act = self.mem, self.act
        count = len(mem) - 1
        slow = max(range(len(order)), key=lambda i: order[i].bin.rate)
        cuts = [0] * (len(order) + 1)
        cuts[-1] = count
        for i in range(slow):
            cuts[i + 1] = min(bisect_right(mem, mem[cuts[i]] + order[i].bin.room) - 1, count - 1)
        for i in range(len(order) - 1, slow, -1):
            if cuts[i + 1] == count:
                cuts[i] = order[i].low_last
            else:
                cuts[i] = order[i].low[cuts[i + 1]] if cuts[i + 1] > 0 else 0
            cuts[i] = max(cuts[i], cuts[slow])
        seconds = order[-1].bin.tail
        for i, item in enumerate(order):
            first, last = cuts[i], cuts[i + 1]
            room = item.bin.room_last if last == count else item.bin.room
            if first >= last or mem[last] - mem[first] > room or (item.bin.first and last == count):
                return None
            seconds += item.bin.hop + item.bin.rate * (act[last] - act[first])
        return Split(seconds, tuple((item.index, cuts[i], cuts[i + 1]) for i, item in enumerate(order)))

    def arrange(self, order: list[Item]) -> Split | None:
        """Best cut points for the devices in this order, each holding at least one layer."""
        times = [0.0] + [inf] * (len(self.mem) - 1)
        backs: list[list[int]] = []
        for item in order[:-1]:
            times, back = self._extend(times, item)
            backs.append(back)
        end = self._finish(times, order[-1])
        if end is None:
            return None
        seconds, cut = end
        runs = [(order[-1].index, cut, len(self.mem) - 1)]
        for item, back in zip(reversed(order[:-1]), reversed(backs), strict=True):
            runs.append((item.index, back[cut], cut))
            cut = back[cut]
        return Split(seconds, tuple(reversed(runs)))

    def _extend(self, times: list[float], item: Item) -> tuple[list[float], list[int]]:
        """Let ``item`` hold the layers after each prefix: least time per longer prefix, and its start.

        A sliding window: the earliest start that fits only moves on, so each prefix enters and leaves the
        queue of candidates once.
        """
        act, low, rate, hop = self.act, item.low, item.bin.rate, item.bin.hop
        count = len(act)
        out = [inf] * count
        back = [-1] * count
        window: deque[tuple[float, int]] = deque()
        for end in range(1, count - 1):
            before = times[end - 1]
            if before < inf:
                value = before - rate * act[end - 1]
                while window and window[-1][0] >= value:
                    window.pop()
                window.append((value, end - 1))
            start = low[end]
            while window and window[0][1] < start:
                window.popleft()
            if window:
                value, at = window[0]
                out[end] = value + rate * act[end] + hop
                back[end] = at
        return out, back

    def _finish(self, times: list[float], item: Item) -> tuple[float, int] | None:
        """Let ``item`` hold all the rest with the output: (time, first layer)."""
        act, rate = self.act, item.bin.rate
        fixed = item.bin.hop + item.bin.tail + rate * act[-1]
        best, at = inf, -1
        for start in range(item.low_last, len(act) - 1):
            value = times[start] - rate * act[start]
            if value < best:
                best, at = value, start
        return (best + fixed, at) if at >= 0 else None

    def any_order(self, head: list[Item], rest: list[Item]) -> Split | None:
        """The best over all orders: dynamic programming over sets of devices and prefixes."""
        start = [0.0] + [inf] * (len(self.mem) - 1)
        prefix: list[int] = []
        if head:
            start, prefix = self._extend(start, head[0])
        tables: dict[int, list[float]] = {0: start}
        froms: dict[int, list[tuple[int, int]]] = {}
        full = (1 << len(rest)) - 1
        best: tuple[float, int, int] | None = None
        for mask in range(full):
            times = tables.get(mask)
            if times is None:
                continue
            for i, item in enumerate(rest):
                bit = 1 << i
                if mask & bit:
                    continue
                joined = mask | bit
                if joined == full:
                    end = self._finish(times, item)
                    if end is not None and (best is None or end[0] < best[0]):
                        best = (end[0], end[1], i)
                    continue
                out, back = self._extend(times, item)
                known = tables.get(joined)
                if known is None:
                    tables[joined] = out
                    froms[joined] = [(i, at) for at in back]
                    continue
                origin = froms[joined]
                for p, value in enumerate(out):
                    if value < known[p]:
                        known[p] = value
                        origin[p] = (i, back[p])
        if best is None:
            return None
        seconds, cut, i = best
        runs = [(rest[i].index, cut, len(self.mem) - 1)]
        mask = full & ~(1 << i)
        while mask:
            i, at = froms[mask][cut]
            runs.append((rest[i].index, at, cut))
            cut = at
            mask &= ~(1 << i)
        if head:
            runs.append((head[0].index, prefix[cut], cut))
        return Split(seconds, tuple(reversed(runs)))
