"""Finds the split with the least time per token: which devices, in which order, with which layers.

Layers lie in a row and each device gets a run of them. A device costs a fixed time when it is used (its
hop) and a time per active byte. If all layers are equal, this is a knapsack with fixed charges; its best
solution fills the faster of the chosen devices before the slower ones. That gives a bound for every subset:
branch and bound walks the subsets, fastest first. Only for those whose bound can win does it look for the
best cut points and order, by dynamic programming over the layers. The result is exact within `SLACK` for
the usual sizes; with very many devices the search stops after `EFFORT` steps and keeps the best split found.
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
"""Gain, as a share of the time, that is not worth searching for."""
EFFORT = 4000
"""Maximum number of subsets walked; a quarter of it with more than `SHORTLIST` devices."""
WORK = 2500
"""Maximum steps spent on cut points and orders of promising subsets; ten times that until one fits."""
SHORTLIST = 16
ALL_ORDERS, ALL_STEPS = 4, 6000
"""Up to this many devices every order is tried; with more devices, if it takes at most this many steps."""
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
    """Return the fastest split, or None when none fits.

    Args:
        memory: bytes that each layer takes, the output as the last.
        active: bytes of each layer that are read per token.
        bins: the devices.
        weights: bytes of ``memory`` that are read from the file, by layer; empty: all of them.
        buffers: bytes each device takes besides its layers.
        most: maximum number of devices, not counting the ``first`` kind.
        workers: maximum number of machines with workers.
        host: a device of the ``first`` kind must hold layers.
        apart: some machine must run a worker.
        below: ignore splits that take this many seconds or more.
        largest: bytes of each layer's largest tensor; empty: loading takes no extra memory.
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
            bounds = items[i]
            self.hops[i] = min(self.hops[i + 1], bounds.bin.hop)
            # A byte costs least when the device is full.
            self.price[i] = min(self.price[i + 1], bounds.bin.rate + bounds.bin.hop / bounds.cap)
            self.rest[i] = self.rest[i + 1] + bounds.cap
        # Some device must hold the output, so at least the smallest tail is paid.
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
        """Return the seconds a split must stay below to win."""
        return self.best.seconds * (1 - SLACK) if self.best is not None else self.below

    def _shortlist(self) -> list[int]:
        """Return the bins worth searching: with very many, the best by time per byte and the roomiest."""
        indexes = [i for i, device in enumerate(self.bins) if device.room > 0]
        if len(indexes) <= SHORTLIST:
            return indexes
        buffers = self.layers.buffers.middle
        indexes = [i for i in indexes if self.bins[i].first or self.bins[i].room > buffers]
        total = self.layers.mem[-1] or 1
        ratio = self.layers.act[-1] / total

        def merit(i: int) -> tuple[float, int]:
            device = self.bins[i]
            capacity = min(device.room - (0 if device.first else buffers), total)
            return device.hop / capacity + device.rate * ratio, -capacity

        def by_room(i: int) -> tuple[int, float]:
            return -self.bins[i].room, self.bins[i].rate

        chosen = sorted(indexes, key=merit)[:SHORTLIST]
        chosen += sorted(indexes, key=by_room)[: self.most]
        chosen += [i for i in indexes if self.bins[i].worker < 0]
        return sorted(set(chosen))

    def _walk(self, start: int, chosen: list[BinBounds], cost: float, remaining: float) -> None:
        """Try all supersets of ``chosen`` with items from ``start`` on."""
        if remaining <= 0 and chosen:
            if self._leaf(chosen, cost):
                return
            remaining = 0.0
        items = self.items
        taken_groups = {item.bin.group for item in chosen if item.bin.group >= 0}
        machines = {item.bin.worker for item in chosen if item.bin.worker >= 0}
        full = len(chosen) - sum(item.bin.first for item in chosen) >= self.most
        for j in range(start, len(items)):
            item = items[j]
            device = item.bin
            if remaining > self.rest[j]:
                break
            bar = self._bar()
            if cost + max(self.hops[j], remaining * self.price[j]) >= bar:
                break
            self.effort += 1
            if self.effort > self.most_effort:
                break
            taken = min(remaining, item.cap)
            price = cost + device.hop + taken * device.rate
            if price + (remaining - taken) * self.price[j + 1] >= bar if remaining > taken else price >= bar:
                continue
            if (full and not device.first) or device.group in taken_groups:
                continue
            if device.worker >= 0 and device.worker not in machines and len(machines) >= self.workers:
                continue
            if j > start and self._is_redundant(item, items[j - 1]):
                continue
            chosen.append(item)
            self._walk(j + 1, chosen, price, remaining - taken)
            chosen.pop()

    def _is_redundant(self, item: BinBounds, previous: BinBounds) -> bool:
        """Return whether the ``previous`` device is equivalent, so that ``item`` needs no trial of its own.

        If the number of workers is limited, a machine with several devices is not equivalent to one with a
        single device: its other devices add no worker.
        """
        return _equivalent(item, previous) and (not self.scarce or self.devices[item.bin.worker] == 1)

    def _leaf(self, chosen: list[BinBounds], bound: float) -> bool:
        """Fill these devices, which may suffice. Return whether no further device can improve the result."""
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
        # Layers are indivisible: one more device may take a layer that fits these badly.
        return found is not None and found.seconds <= bound * (1 + 2 * ENOUGH)

    def _refine(self, chosen: tuple[BinBounds, ...], bound: float) -> int:
        """Find the best order and cut points for exactly these devices. Return the number of steps taken."""
        head = [item for item in chosen if item.bin.first]
        rest = [item for item in chosen if not item.bin.first]
        order_steps = len(rest) * len(self.layers.mem)
        if len(rest) <= ALL_ORDERS or (1 << (len(rest) - 1)) * order_steps <= ALL_STEPS:
            orders = 1 << (len(rest) - 1)
            found = self.partition.any_order(head, rest, self._bar())
        else:
            orders = 6
            found = self.partition.some_orders(head, rest, bound, self._bar())
        if found is not None:
            self._keep(found)
        return orders * order_steps

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


def _equivalent(first: BinBounds, second: BinBounds) -> bool:
    a, b = first.bin, second.bin
    return (
        a.worker != b.worker
        and a.group == b.group == -1
        and (a.rate, a.hop, a.tail, a.room, a.loading, a.first)
        == (b.rate, b.hop, b.tail, b.room, b.loading, b.first)
    )
