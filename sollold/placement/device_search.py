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

from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from math import inf

from sollold.facts import dataclass
from sollold.placement.layer_runs import Bin, BinBounds, Buffers, Layers, Split
from sollold.placement.partition import ENOUGH, Partition

SLACK = 0.002
"""Gain (as a share of the time) that is not worth looking for."""
EFFORT = 4000
"""Subsets walked at most; a quarter with more than `SHORTLIST` devices."""
WORK = 2500
"""Steps for the best cut points and orders of the promising subsets; ten times that until one fits."""
SHORTLIST = 16
ALL_ORDERS, ALL_STEPS = 4, 6000
"""Up to so many devices every order is tried, and of more where that takes no more steps."""
NOTHING = Buffers()


def best_split(
    memory: Sequence[int],
    active: Sequence[int],
    bins: Sequence[Bin],
    *,
    weights: Sequence[int] = (),
    buffers: Buffers = NOTHING,
    most: int = 15,
    workers: int = 15,
    host: bool = False,
    apart: bool = False,
    below: float = inf,
    largest: Sequence[int] = (),
) -> Split | None:
    """The fastest split, or None when none fits.

    Args:
        memory: bytes that each layer takes, the output as the last.
        active: bytes of each that are read per token.
        bins: the devices.
        weights: bytes of ``memory`` that are read from the file; empty: all.
        buffers: what each device takes besides.
        most: devices used at most, the ``first`` kind not counted.
        workers: machines with workers at most.
        host: one of the ``first`` kind must hold layers.
        apart: some machine must run a worker.
        below: only splits quicker than this are of interest.
        largest: bytes of each layer's largest tensor; empty: nothing more is taken while they are loaded.
    """
    layers = Layers(memory, active, weights, buffers, largest)
    search = _Search(layers, Partition(layers), bins, most, workers, host, apart, below)
    search.run()
    return search.best


@dataclass(slots=True)
class _Search:
    layers: Layers
    partition: Partition
    bins: Sequence[Bin]
    most: int
    workers: int
    host: bool
    apart: bool
    below: float
    best: Split | None = None
    effort: int = 0
    leaves: list[tuple[float, tuple[BinBounds, ...]]] = field(default_factory=list)
    many: bool = field(init=False)
    most_effort: int = field(init=False)
    devices: Counter[int] = field(init=False)
    scarce: bool = field(init=False)
    items: list[BinBounds] = field(init=False)
    hops: list[float] = field(init=False)
    price: list[float] = field(init=False)
    rest: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.many = len(self.bins) > SHORTLIST
        self.most_effort = EFFORT // 4 if self.many else EFFORT

    def run(self) -> None:
        items = [
            item for index in self._shortlist() if (item := self.layers.item(index, self.bins[index])).cap > 0
        ]
        items.sort(key=lambda item: (item.bin.rate, item.bin.hop, -item.cap, item.index))
        if not items:
            return
        self.items = items
        self.devices = Counter(item.bin.worker for item in items if item.bin.worker >= 0)
        self.scarce = self.workers < len(self.devices)
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
        ends = [item.bin.tail for item in items if item.low_last < len(self.layers.mem) - 1]
        if not ends:
            return
        self._walk(0, [], min(ends), float(self.layers.act[-1]))
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
        everything = [i for i, one in enumerate(self.bins) if one.room > 0]
        if len(everything) <= SHORTLIST:
            return everything
        buffers = self.layers.buffers.middle
        everything = [i for i in everything if self.bins[i].first or self.bins[i].room > buffers]
        total = self.layers.mem[-1] or 1
        ratio = self.layers.act[-1] / total

        def merit(i: int) -> tuple[float, int]:
            one = self.bins[i]
            held = min(one.room - (0 if one.first else buffers), total)
            return one.hop / held + one.rate * ratio, -held

        def by_room(i: int) -> tuple[int, float]:
            return -self.bins[i].room, self.bins[i].rate

        kept = sorted(everything, key=merit)[:SHORTLIST]
        kept += sorted(everything, key=by_room)[: self.most]
        kept += [i for i in everything if self.bins[i].worker < 0]
        return sorted(set(kept))

    def _walk(self, start: int, chosen: list[BinBounds], cost: float, left: float) -> None:
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
            if j > start and self._no_news(item, items[j - 1]):
                continue
            chosen.append(item)
            self._walk(j + 1, chosen, price, left - taken)
            chosen.pop()

    def _no_news(self, one: BinBounds, before: BinBounds) -> bool:
        """Whether all that can be done with a device was tried with the one before it, which is alike.

        Where machines are counted it is not so of one that has more devices: they cost no further machine.
        """
        return _alike(one, before) and (not self.scarce or self.devices[one.bin.worker] == 1)

    def _leaf(self, chosen: list[BinBounds], bound: float) -> bool:
        """These devices may do: fill them. Returns whether no further device can make it any better."""
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        if not rest or len(head) > 1 or (self.host and not head):
            return False
        if self.apart and all(item.bin.worker < 0 for item in rest):
            return False
        found: Split | None = None
        for last in sorted(rest, key=lambda item: (item.bin.tail, item.bin.rate))[:3]:
            split = self.partition.pour([*head, *(item for item in rest if item is not last), last])
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

    def _refine(self, chosen: tuple[BinBounds, ...], bound: float) -> int:
        """Find the best order and cut points for exactly these devices. Returns the steps it took."""
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        each = len(rest) * len(self.layers.mem)
        if len(rest) <= ALL_ORDERS or (1 << (len(rest) - 1)) * each <= ALL_STEPS:
            orders = 1 << (len(rest) - 1)
            found = self.partition.any_order(head, rest, self._bar())
        else:
            orders = 6
            found = self.partition.some_orders(head, rest, bound, self._bar())
        if found is not None:
            self._keep(found)
        return orders * each

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


def _alike(one: BinBounds, other: BinBounds) -> bool:
    a, b = one.bin, other.bin
    return (
        a.worker != b.worker
        and a.group == b.group == -1
        and (a.rate, a.hop, a.tail, a.room, a.loading, a.first)
        == (b.rate, b.hop, b.tail, b.room, b.loading, b.first)
    )
