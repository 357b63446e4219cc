"""The split with the least time per token: which devices, in which order, with which layers.

Layers lie in a row and each device gets a run of them. A device costs a fixed time when it is used (its
hop) and a time per active byte. With layers alike this is a knapsack with fixed charges, whose best
answer fills the faster of the chosen devices before the slower ones. That gives a bound for every
subset: branch and bound walks the subsets, fastest first, and only for those whose bound can win looks
for the true best cut points and order, by dynamic programming over the layers. Exact for the usual sizes
within `SLACK`; for very many devices the search is cut short after `EFFORT` steps and keeps the best
found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

SLACK = 0.002
"""Gain (as a share of the time) that is not worth looking for."""
EFFORT = 4000
"""Subsets walked at most."""
LEAVES = 24
"""Subsets for which cut points are sought at most, unless none has fitted yet."""
LEAVES_AT_MOST = 200
SHORTLIST = 16
ALL_ORDERS = 4
"""Up to so many devices every order is tried."""


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


def best_split(
    memory: Sequence[int],
    active: Sequence[int],
    bins: Sequence[Bin],
    *,
    most: int = 15,
    workers: int = 15,
) -> Split | None:
    """The fastest split, or None when none fits.

    Args:
        memory: bytes that each layer takes, the output as the last.
        active: bytes of each that are read per token.
        bins: the devices.
        most: devices used at most, the ``first`` kind not counted.
        workers: machines with workers at most.
    """
    search = _Search(memory, active, bins, most, workers)
    search.run()
    return search.best


@dataclass(slots=True)
class _Item:
    """A bin with what was worked out about it: ``cap``: most active bytes that fit in a run."""

    index: int
    bin: Bin
    cap: float
    low: list[int]
    low_last: int


@dataclass(slots=True)
class _Search:
    memory: Sequence[int]
    active: Sequence[int]
    bins: Sequence[Bin]
    most: int
    workers: int
    best: Split | None = None
    effort: int = 0
    leaves: int = 0
    mem: list[int] = field(init=False)
    act: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.mem = [0, *accumulate(self.memory)]
        self.act = [0, *accumulate(self.active)]

    def run(self) -> None:
        items = [item for index in self._shortlist() if (item := self._item(index)).cap > 0]
        items.sort(key=lambda item: (item.bin.rate, item.bin.hop, -item.cap, item.index))
        if not items:
            return
        hops = [item.bin.hop for item in items]
        for i in range(len(items) - 2, -1, -1):
            hops[i] = min(hops[i], hops[i + 1])
        caps = [item.cap for item in items]
        rest = [0.0] * (len(items) + 1)
        for i in range(len(items) - 1, -1, -1):
            rest[i] = rest[i + 1] + caps[i]
        self._walk(items, hops, rest, 0, [], 0.0, float(self.act[-1]))

    def _shortlist(self) -> list[int]:
        """Indices worth searching: with very many bins the best by time a byte, and the roomiest."""
        everything = [i for i, one in enumerate(self.bins) if max(one.room, one.room_last) > 0]
        if len(everything) <= SHORTLIST:
            return everything
        total = self.mem[-1] or 1
        ratio = self.act[-1] / total

        def merit(i: int) -> tuple[float, int]:
            one = self.bins[i]
            held = min(max(one.room, one.room_last), total)
            return one.hop / held + one.rate * ratio, -held

        def by_room(i: int) -> tuple[int, float]:
            return -max(self.bins[i].room, self.bins[i].room_last), self.bins[i].rate

        kept = sorted(everything, key=merit)[:SHORTLIST]
        kept += sorted(everything, key=by_room)[: self.most]
        kept += [i for i in everything if self.bins[i].worker < 0]
        return sorted(set(kept))

    def _item(self, index: int) -> _Item:
        one, mem, act = self.bins[index], self.mem, self.act
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
        return _Item(index, one, float(cap), low, low_last)

    def _walk(
        self,
        items: list[_Item],
        hops: list[float],
        rest: list[float],
        start: int,
        chosen: list[_Item],
        cost: float,
        left: float,
    ) -> bool:
        """Try all supersets of ``chosen`` with items from ``start`` on. Returns whether one fitted."""
        fitted = False
        if left <= 0 and chosen:
            if self._leaf(chosen, cost):
                return True
            left = 0.0
        for j in range(start, len(items)):
            item = items[j]
            if left > rest[j]:
                break
            bar = self.best.seconds * (1 - SLACK) if self.best is not None else inf
            if cost + hops[j] + left * item.bin.rate >= bar:
                break
            self.effort += 1
            if self.effort > EFFORT or self.leaves >= LEAVES_AT_MOST:
                break
            if self.leaves >= LEAVES and self.best is not None:
                break
            taken = min(left, item.cap)
            price = cost + item.bin.hop + taken * item.bin.rate
            if price >= bar or not self._may_join(item, chosen):
                continue
            if j > start and _alike(item, items[j - 1]):
                continue
            chosen.append(item)
            if self._walk(items, hops, rest, j + 1, chosen, price, left - taken):
                fitted = True
            chosen.pop()
        return fitted

    def _may_join(self, item: _Item, chosen: list[_Item]) -> bool:
        one = item.bin
        used = sum(1 for other in chosen if not other.bin.first)
        if not one.first and used >= self.most:
            return False
        if one.group >= 0 and any(other.bin.group == one.group for other in chosen):
            return False
        if one.worker >= 0:
            machines = {other.bin.worker for other in chosen if other.bin.worker >= 0}
            if one.worker not in machines and len(machines) >= self.workers:
                return False
        return True

    def _leaf(self, chosen: list[_Item], bound: float) -> bool:
        """Find order and cut points for exactly these devices. Returns whether they hold the model."""
        self.leaves += 1
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        if not rest or len(head) > 1:
            return False
        found: Split | None = None
        lasts = sorted(rest, key=lambda item: (item.bin.tail, item.bin.rate))
        for last in lasts[:3]:
            others = [item for item in rest if item is not last]
            split = self._arrange([*head, *others, last])
            if split is not None and (found is None or split.seconds < found.seconds):
                found = split
            if found is not None and found.seconds <= bound * (1 + SLACK):
                break
        if found is None or found.seconds > bound * (1 + SLACK):
            better = self._any_order(head, rest) if len(rest) <= ALL_ORDERS else self._some_orders(head, rest)
            if better is not None and (found is None or better.seconds < found.seconds):
                found = better
        if found is None:
            return False
        if self.best is None or self._wins(found, self.best):
            self.best = found
        return True

    @staticmethod
    def _wins(new: Split, old: Split) -> bool:
        if len(new.runs) < len(old.runs):
            return new.seconds <= old.seconds * (1 + SLACK)
        return new.seconds < old.seconds * (1 - SLACK) or (
            len(new.runs) == len(old.runs) and new.seconds < old.seconds
        )

    def _some_orders(self, head: list[_Item], rest: list[_Item]) -> Split | None:
        """More orders for many devices: each one last, the others roomy first, then small first."""
        found: Split | None = None
        for last in sorted(rest, key=lambda item: -item.bin.room_last)[:3]:
            others = [item for item in rest if item is not last]
            for sign in (-1, 1):
                others.sort(key=lambda item: sign * item.bin.room)
                split = self._arrange([*head, *others, last])
                if split is not None and (found is None or split.seconds < found.seconds):
                    found = split
        return found

    def _arrange(self, order: list[_Item]) -> Split | None:
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

    def _extend(self, times: list[float], item: _Item) -> tuple[list[float], list[int]]:
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

    def _finish(self, times: list[float], item: _Item) -> tuple[float, int] | None:
        """Let ``item`` hold all the rest with the output: (time, first layer)."""
        act, rate = self.act, item.bin.rate
        fixed = item.bin.hop + item.bin.tail + rate * act[-1]
        best, at = inf, -1
        for start in range(item.low_last, len(act) - 1):
            value = times[start] - rate * act[start]
            if value < best:
                best, at = value, start
        return (best + fixed, at) if at >= 0 else None

    def _any_order(self, head: list[_Item], rest: list[_Item]) -> Split | None:
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


def _alike(one: _Item, other: _Item) -> bool:
    a, b = one.bin, other.bin
    return (
        a.worker != b.worker
        and a.group == b.group == -1
        and (a.rate, a.hop, a.tail, a.room, a.room_last, a.first)
        == (b.rate, b.hop, b.tail, b.room, b.room_last, b.first)
    )
