"""Finds the best runs of layers for a given set of devices. Seconds and bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from math import inf

from sollold.facts import dataclass
from sollold.placement.layer_runs import BinBounds, Layers, Split

ENOUGH = 0.005
"""Stop looking for better orders once a split is within this fraction of its devices' bound."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Cuts one model's layers into runs."""

    layers: Layers

    def some_orders(
        self, head: list[BinBounds], rest: list[BinBounds], bound: float, bar: float
    ) -> Split | None:
        """Try some orders of many devices: a few as the last, the rest by speed, largest or smallest first.

        Splits that take ``bar`` seconds or more are ignored.
        """
        found: Split | None = None
        keys: list[Callable[[BinBounds], float]] = [
            lambda item: item.bin.rate,
            lambda item: -item.bin.room,
            lambda item: item.bin.room,
        ]
        tried: set[tuple[int, ...]] = set()
        lasts = sorted(rest, key=lambda item: (item.bin.tail, item.bin.rate))[:2]
        for last in dict.fromkeys((*(id(item) for item in lasts), id(max(rest, key=lambda i: i.bin.room)))):
            end = next(item for item in rest if id(item) == last)
            for key in keys:
                order = [*head, *sorted((item for item in rest if item is not end), key=key), end]
                indices = tuple(item.index for item in order)
                if indices in tried:
                    continue
                tried.add(indices)
                split = self.arrange(order, min(bar, found.seconds if found is not None else inf))
                if split is not None and (found is None or split.seconds < found.seconds):
                    found = split
                if found is not None and found.seconds <= bound * (1 + ENOUGH):
                    return found
        return found

    def pour(self, order: list[BinBounds]) -> Split | None:
        """Fill all devices but the slowest, from both ends; the slowest gets what is left in between.

        This is fast, and optimal when all layers are equal.
        """
        act = self.layers.act
        count = len(act) - 1
        slow = max(range(len(order)), key=lambda i: order[i].bin.rate)
        cuts = [0] * (len(order) + 1)
        cuts[-1] = count
        for i in range(slow):
            cuts[i + 1] = _reach(order[i], cuts[i])
        for i in range(len(order) - 1, slow, -1):
            if cuts[i + 1] == count:
                cuts[i] = order[i].low_last
            else:
                cuts[i] = order[i].low[cuts[i + 1]] if cuts[i + 1] > 0 else 0
            cuts[i] = max(cuts[i], cuts[slow])
        seconds = order[-1].bin.tail
        for i, item in enumerate(order):
            first, last = cuts[i], cuts[i + 1]
            low = item.low_last if last == count else item.low[last]
            if first >= last or first < low or (item.bin.first and last == count):
                return None
            seconds += item.bin.hop + item.bin.rate * (act[last] - act[first])
        return Split(seconds, tuple((item.index, cuts[i], cuts[i + 1]) for i, item in enumerate(order)))

    def arrange(self, order: list[BinBounds], bar: float) -> Split | None:
        """Return the best cut points for the devices in this order, each holding at least one layer.

        Return None if nothing fits, or nothing can take less than ``bar`` seconds.
        """
        # Each cut lies between what the devices after it need and what those before it can reach.
        highs = [0]
        for item in order[:-1]:
            highs.append(_reach(item, highs[-1]))
        lows = [order[-1].low_last]
        for item in reversed(order[:-1]):
            lows.append(item.low[lows[-1]])
        lows.reverse()
        if any(low > high for low, high in zip(lows, highs, strict=True)):
            return None
        times = [0.0] + [inf] * (len(self.layers.mem) - 1)
        backs: list[list[int]] = []
        for i, item in enumerate(order[:-1]):
            times, back = self._extend(times, item, lows[i], lows[i + 1], highs[i + 1])
            backs.append(back)
            if self._lower_bound(times, order[i + 1 :], lows[i + 1], highs[i + 1]) >= bar:
                return None
        end = self._finish(times, order[-1])
        if end is None:
            return None
        seconds, cut = end
        runs = [(order[-1].index, cut, len(self.layers.mem) - 1)]
        for item, back in zip(reversed(order[:-1]), reversed(backs), strict=True):
            runs.append((item.index, back[cut], cut))
            cut = back[cut]
        return Split(seconds, tuple(reversed(runs)))

    def _extend(
        self, times: list[float], item: BinBounds, begin: int = 0, low_end: int = 1, high_end: int = -1
    ) -> tuple[list[float], list[int]]:
        """Append a run on ``item`` to each prefix: return the least time of each longer prefix, and its cut.

        Considers only runs that start at ``begin`` or later and end from ``low_end`` to ``high_end``. This is
        a sliding window: the earliest start that fits only moves forward, so each prefix enters and leaves
        the queue of candidates once.
        """
        low, hop, rate = item.low, item.bin.hop, item.bin.rate
        # Cumulative seconds: a run takes the difference of two.
        read = item.read = item.read or [rate * size for size in self.layers.act]
        count = len(read)
        if high_end < 0:
            high_end = count - 2
        out = [inf] * count
        back = [-1] * count
        # The candidates, best first: from `lead` on, values and starts ascend.
        values: list[float] = []
        starts: list[int] = []
        lead = size = 0
        position = begin
        for end in range(max(low_end, 1), high_end + 1):
            while position < end:
                value = times[position] - read[position]
                if value < inf:
                    while size > lead and values[-1] >= value:
                        values.pop()
                        starts.pop()
                        size -= 1
                    values.append(value)
                    starts.append(position)
                    size += 1
                position += 1
            start = low[end]
            while lead < size and starts[lead] < start:
                lead += 1
            if lead < size:
                out[end] = values[lead] + read[end] + hop
                back[end] = starts[lead]
        return out, back

    def _lower_bound(self, times: list[float], items: list[BinBounds], low: int, high: int) -> float:
        """Return a lower bound: after prefixes of ``low`` to ``high`` layers, the fastest device does all."""
        act = self.layers.act
        rate = min(item.bin.rate for item in items)
        fixed = sum(item.bin.hop for item in items) + min(item.bin.tail for item in items)
        pairs = zip(times[low : high + 1], act[low : high + 1], strict=True)
        return min((time - rate * size for time, size in pairs), default=inf) + rate * act[-1] + fixed

    def _finish(self, times: list[float], item: BinBounds) -> tuple[float, int] | None:
        """Let ``item`` hold everything left, with the output. Return (time, first layer), or None."""
        act, rate = self.layers.act, item.bin.rate
        fixed = item.bin.hop + item.bin.tail + rate * act[-1]
        best, cut = inf, -1
        for start in range(item.low_last, len(act) - 1):
            value = times[start] - rate * act[start]
            if value < best:
                best, cut = value, start
        return (best + fixed, cut) if cut >= 0 else None

    def any_order(self, head: list[BinBounds], rest: list[BinBounds], bar: float) -> Split | None:
        """Return the best split over all orders, by dynamic programming over sets of devices and prefixes.

        Return None if nothing fits, or nothing can take less than ``bar`` seconds.
        """
        start = [0.0] + [inf] * (len(self.layers.mem) - 1)
        prefix: list[int] = []
        if head:
            start, prefix = self._extend(start, head[0])
        tables: dict[int, list[float]] = {0: start}
        froms: dict[int, list[tuple[int, int]]] = {}
        full = (1 << len(rest)) - 1
        lows, highs = self._bounds(head, rest)
        best: tuple[float, int, int] | None = None
        for mask in range(full):
            times = tables.get(mask)
            if times is None:
                continue
            remaining = [item for i, item in enumerate(rest) if not mask & 1 << i]
            if self._lower_bound(times, remaining, lows[mask], highs[mask]) >= (
                best[0] if best is not None else bar
            ):
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
                low, high = lows[joined], highs[joined]
                if low > high:
                    continue
                out, back = self._extend(times, item, lows[mask], low, high)
                table = tables.get(joined)
                if table is None:
                    tables[joined] = out
                    froms[joined] = [(i, first) for first in back]
                    continue
                origin = froms[joined]
                for p in range(low, high + 1):
                    if out[p] < table[p]:
                        table[p] = out[p]
                        origin[p] = (i, back[p])
        if best is None:
            return None
        seconds, cut, i = best
        runs = [(rest[i].index, cut, len(self.layers.mem) - 1)]
        mask = full & ~(1 << i)
        while mask:
            i, begin = froms[mask][cut]
            runs.append((rest[i].index, begin, cut))
            cut = begin
            mask &= ~(1 << i)
        if head:
            runs.append((head[0].index, prefix[cut], cut))
        return Split(seconds, tuple(reversed(runs)))

    def _bounds(self, head: list[BinBounds], rest: list[BinBounds]) -> tuple[list[int], list[int]]:
        """Return, for each set of devices, the lowest and highest first layer of a run after exactly these.

        The set must hold what comes before the run, and the other devices the rest.
        """
        mem = self.layers.mem
        count = len(mem) - 1
        least = (
            min(self.layers.buffers.least, self.layers.buffers.output)
            if self.layers.buffers.exact
            else min(
                self.layers.buffers.begins,
                self.layers.buffers.middle,
                self.layers.buffers.ends,
                self.layers.buffers.output,
            )
        )
        rooms = [0]
        for item in rest:
            rooms += [room + item.bin.room - least for room in rooms]
        head_room = sum(item.bin.room for item in head)
        all_room = rooms[-1]
        lows = [max(bisect_left(mem, mem[count] - (all_room - room)), room > 0) for room in rooms]
        highs = [min(bisect_right(mem, head_room + room) - 1, count - 1) for room in rooms]
        lows[0] = 0
        return lows, highs


def _reach(item: BinBounds, start: int) -> int:
    """Return the largest (exclusive) end of a run from ``start`` on without the output."""
    return bisect_right(item.low, start, start, len(item.low) - 1) - 1
