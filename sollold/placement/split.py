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

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

SLACK = 0.002
"""Gain (as a share of the time) that is not worth looking for."""
ENOUGH = 0.005
"""How near to the bound of its devices a split must come before better orders are looked for."""
EFFORT = 4000
"""Subsets walked at most; a quarter with more than `SHORTLIST` devices."""
WORK = 2500
"""Steps for the best cut points and orders of the promising subsets; ten times that until one fits."""
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
    below: float = inf,
) -> Split | None:
    """The fastest split, or None when none fits.

    Args:
        memory: bytes that each layer takes, the output as the last.
        active: bytes of each that are read per token.
        bins: the devices.
        most: devices used at most, the ``first`` kind not counted.
        workers: machines with workers at most.
        below: only splits quicker than this are of interest.
    """
    search = _Search(memory, active, bins, most, workers, below)
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
    below: float
    best: Split | None = None
    effort: int = 0
    leaves: list[tuple[float, tuple[_Item, ...]]] = field(default_factory=list)
    many: bool = field(init=False)
    most_effort: int = field(init=False)
    items: list[_Item] = field(init=False)
    hops: list[float] = field(init=False)
    price: list[float] = field(init=False)
    rest: list[float] = field(init=False)
    mem: list[int] = field(init=False)
    act: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.many = len(self.bins) > SHORTLIST
        self.most_effort = EFFORT // 4 if self.many else EFFORT
        self.mem = [0, *accumulate(self.memory)]
        self.act = [0, *accumulate(self.active)]

    def run(self) -> None:
        items = [item for index in self._shortlist() if (item := self._item(index)).cap > 0]
        items.sort(key=lambda item: (item.bin.rate, item.bin.hop, -item.cap, item.index))
        if not items:
            return
        self.items = items
        count = len(items)
        self.hops = [inf] * (count + 1)
        self.price = [inf] * (count + 1)
        self.rest = [0.0] * (count + 1)
        for i in range(count - 1, -1, -1):
            one = items[i]
            self.hops[i] = min(self.hops[i + 1], one.bin.hop)
            # A byte on a device costs no less than when the device is full.
            self.price[i] = min(self.price[i + 1], one.bin.rate + one.bin.hop / one.cap)
            self.rest[i] = self.rest[i + 1] + one.cap
        # Some device must hold the output, so its tail at the least is paid.
        ends = [item.bin.tail for item in items if item.low_last < len(self.mem) - 1]
        if not ends:
            return
        self._walk(0, [], min(ends), float(self.act[-1]))
        self.leaves.sort(key=lambda leaf: leaf[0])
        work = 0
        for bound, chosen in self.leaves:
            if bound >= self._bar() or work > (WORK if self.best is not None else 10 * WORK):
                break
            work += self._refine(chosen, bound)

    def _bar(self) -> float:
        """Only what is quicker than this can win."""
        return self.best.seconds * (1 - SLACK) if self.best is not None else self.below

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

    def _walk(self, start: int, chosen: list[_Item], cost: float, left: float) -> None:
        """Try all supersets of ``chosen`` with items from ``start`` on."""
        if left <= 0 and chosen:
            if self._leaf(chosen, cost):
                return
            left = 0.0
        items = self.items
        taken_groups = {item.bin.group for item in chosen if item.bin.group >= 0}
        machines = {item.bin.worker for item in chosen if item.bin.worker >= 0}
        full = len(chosen) - sum(item.bin.first for item in chosen) >= self.most
        for j in range(start, len(items)):
            item = items[j]
            one = item.bin
            if left > self.rest[j]:
                break
            bar = self._bar()
            if cost + max(self.hops[j], left * self.price[j]) >= bar:
                break
            self.effort += 1
            if self.effort > self.most_effort:
                break
            taken = min(left, item.cap)
            price = cost + one.hop + taken * one.rate
            if price + (left - taken) * self.price[j + 1] >= bar if left > taken else price >= bar:
                continue
            if (full and not one.first) or one.group in taken_groups:
                continue
            if one.worker >= 0 and one.worker not in machines and len(machines) >= self.workers:
                continue
            if j > start and _alike(item, items[j - 1]):
                continue
            chosen.append(item)
            self._walk(j + 1, chosen, price, left - taken)
            chosen.pop()

    def _leaf(self, chosen: list[_Item], bound: float) -> bool:
        """These devices may do: fill them. Returns whether no further device can make it any better."""
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        if not rest or len(head) > 1:
            return False
        found: Split | None = None
        for last in sorted(rest, key=lambda item: (item.bin.tail, item.bin.rate))[:3]:
            split = self._pour([*head, *(item for item in rest if item is not last), last])
            if split is not None and (found is None or split.seconds < found.seconds):
                found = split
            if found is not None and found.seconds <= bound * (1 + ENOUGH):
                break
        if found is not None:
            self._keep(found)
        if found is not None and (found.seconds <= bound * (1 + ENOUGH) or self.many):
            return True
        self.leaves.append((bound, tuple(chosen)))
        # Layers are whole: one more device may take the piece that ill fits these.
        return found is not None and found.seconds <= bound * (1 + 2 * ENOUGH)

    def _refine(self, chosen: tuple[_Item, ...], bound: float) -> int:
        """Find the best order and cut points for exactly these devices. Returns the steps it took."""
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        if len(rest) <= ALL_ORDERS:
            found = self._any_order(head, rest)
        else:
            found = self._some_orders(head, rest, bound)
        if found is not None:
            self._keep(found)
        orders = 2 ** (len(rest) - 1) if len(rest) <= ALL_ORDERS else 6
        return orders * len(rest) * len(self.mem)

    def _keep(self, found: Split) -> None:
        if self.best is None:
            if found.seconds < self.below:
                self.best = found
        elif self._wins(found, self.best):
            self.best = found

    @staticmethod
    def _wins(new: Split, old: Split) -> bool:
        if len(new.runs) < len(old.runs):
            return new.seconds <= old.seconds * (1 + SLACK)
        return new.seconds < old.seconds * (1 - SLACK) or (
            len(new.runs) == len(old.runs) and new.seconds < old.seconds
        )

    def _some_orders(self, head: list[_Item], rest: list[_Item], bound: float) -> Split | None:
        """Some orders for many devices: few ones last, the others by speed, roomy first, or small first."""
        found: Split | None = None
        keys: list[Callable[[_Item], float]] = [
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
                split = self._arrange([*head, *others, end])
                if split is not None and (found is None or split.seconds < found.seconds):
                    found = split
                if found is not None and found.seconds <= bound * (1 + ENOUGH):
                    return found
        return found

    def _pour(self, order: list[_Item]) -> Split | None:
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
