"""Where a model goes: alone on a machine if it fits, else the fastest split over several.

Pure. `plan` tries the settings of `sollold.placement.context` one after the other; for each, every
machine that has the file alone, then the splits headed by the most promising of them. What lost is kept
with its reason, and when nothing fits, the arithmetic (`sollold.placement.shortfall`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from sollold.machine.device import Kind
from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement import context, speed
from sollold.placement.draft import Draft, Hold, draft, host_share, is_worker, link_to
from sollold.placement.fleet import Fleet, Link, Machine, Spot, links_between
from sollold.placement.proportion import Room, by_count, by_room
from sollold.placement.split import Bin, best_split
from sollold.placement.wish import MOST_DEVICES, Policy, Wish
from sollold.units import bytes_text

FootprintOf = Callable[[Run], Footprint]

HEADS = 4
"""Heads for which splits are sought at most."""
MANY = 64
"""Machines from which on half as many are tried."""
RETRIES = 4
CLEAR_GAIN = 1.5
"""A split replaces a machine that would compute on its processor only if it is this much faster."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was considered and lost. ``tokens_per_second`` 0.0: it does not fit."""

    what: str
    tokens_per_second: float
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The best placement with what it beat. ``draft`` None: nothing fits, not even with the least context,
    for which ``footprint`` then is; ``alternatives`` say what each way lacked."""

    draft: Draft | None
    footprint: Footprint
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]


def choose(
    wish: Wish,
    fleet: Fleet,
    footprint_of: FootprintOf,
    correction: speed.Correction = speed.uncorrected,
) -> Choice:
    """Find the best placement under the room that ``fleet`` has."""
    made: dict[Run, Footprint] = {}

    def print_of(run: Run) -> Footprint:
        if run not in made:
            made[run] = footprint_of(run)
        return made[run]

    train = print_of(context.run_with(wish, context.tokens(wish, 0), max(wish.slots, 1))).context_train
    full, smaller = context.rungs(wish, train)
    found: tuple[Draft, list[Alternative]] | None = None
    tried = _Rung(wish, fleet, print_of(full[0]), full[0], correction)
    alone_allowed = not wish.always and not wish.fixed and wish.policy is not Policy.SPREAD
    if alone_allowed:
        # Fewer requests at a time on one machine go before many over several: a token is quicker there.
        for run in full:
            rung = tried if run is full[0] else _Rung(wish, fleet, print_of(run), run, correction)
            alone = rung.alone()
            if alone is not None:
                found = rung.against_split(alone), rung.lost
                break
    if found is None:
        for run in (*full, *smaller):
            rung = tried if run is full[0] else _Rung(wish, fleet, print_of(run), run, correction)
            best = rung.alone() if alone_allowed and run in smaller else None
            best = best or rung.split()
            if best is not None:
                found = best, rung.lost or tried.lost
                break
        if found is not None and found[0].run in smaller:
            found = _widen(wish, fleet, print_of, correction, found, [*full, *smaller], alone_allowed)
    if found is None:
        return Choice(None, print_of((smaller or full)[-1]), tuple(tried.lost), ())
    best, lost = found
    chosen = print_of(best.run)
    reasons = [*_why(wish, fleet, best, chosen), context.given(wish, best.run, train)]
    if chosen.estimate:
        reasons.append("The architecture is not known: the sizes are estimates on the safe side.")
    return Choice(best, chosen, _ranked(lost, best), tuple(reasons))


def _widen(
    wish: Wish,
    fleet: Fleet,
    print_of: FootprintOf,
    correction: speed.Correction,
    found: tuple[Draft, list[Alternative]],
    order: list[Run],
    alone_allowed: bool,
) -> tuple[Draft, list[Alternative]]:
    """Between the context that fits and the next larger one tried, find the largest that fits."""
    at = order.index(found[0].run)
    steps = context.between(wish, order[at], order[at - 1])
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        rung = _Rung(wish, fleet, print_of(steps[middle]), steps[middle], correction)
        best = (rung.alone() if alone_allowed else None) or rung.split()
        if best is None:
            high = middle
        else:
            low, found = middle, (best, rung.lost)
    return found


class _Rung:
    """The search for one setting of context and slots."""

    def __init__(
        self, wish: Wish, fleet: Fleet, footprint: Footprint, run: Run, correction: speed.Correction
    ) -> None:
        self.wish, self.fleet, self.footprint, self.run, self.correction = (
            wish,
            fleet,
            footprint,
            run,
            correction,
        )
        self.total = footprint.layers + 1
        self.memory = [a + b for a, b in zip(footprint.weights, (*footprint.state, 0), strict=True)]
        self.needed = sum(self.memory)
        self.numbers = {machine.node: number for number, machine in enumerate(fleet.machines)}
        self.buffers: dict[tuple[bool, bool], tuple[int, int]] = {}
        self.lost: list[Alternative] = []
        allowed = set(wish.devices)
        self.spots = {
            machine.node: tuple(
                spot for spot in machine.spots if not allowed or (spot.node, spot.device) in allowed
            )
            for machine in fleet.machines
        }
        held = sum(footprint.weights)
        self.density = wish.parameters / held if held else 0.0

    # One machine

    def heads(self) -> list[Machine]:
        """Machines that can be the head."""
        return [
            machine
            for machine in self.fleet.machines
            if machine.holds and self.wish.head in ("", machine.node)
        ]

    def alone(self) -> Draft | None:
        """The fastest placement on one machine."""
        best: Draft | None = None
        for head in self.heads():
            found = self._alone_on(head)
            if found is None:
                continue
            if best is None or found.seconds < best.seconds:
                best, found = found, best
            if found is not None:
                self._lose(found, f"slower than {best.head.name} alone")
        return best

    def _alone_on(self, head: Machine) -> Draft | None:
        spots = self.spots[head.node]
        gpus = [spot for spot in spots if spot.kind is Kind.GPU]
        cpu = next((spot for spot in spots if spot.kind is Kind.CPU), None)
        links = {head.node: speed.LOOPBACK}
        made = [self._draft(head, 0, [(spot, 0, self.total)], links) for spot in gpus]
        fitting = [one for one in made if not one.short]
        if not fitting and gpus and head.room > self.needed:
            bins = [(spot, self._bin(spot, head, links, copies=True)) for spot in gpus]
            several = self._search(head, bins, links) if len(gpus) > 1 else None
            if several is None and cpu is not None:
                bins = [(spot, self._bin(spot, head, links, copies=False)) for spot in gpus]
                several = self._search(head, [*bins, (cpu, self._host_bin(cpu, head))], links)
            if several is not None:
                fitting.append(several)
        if cpu is not None and not fitting:
            made.append(self._draft(head, self.total, [], links))
            fitting += [made[-1]] if not made[-1].short else []
        if fitting:
            return min(fitting, key=lambda one: one.seconds)
        self._cannot(head, made)
        return None

    def _cannot(self, head: Machine, made: Sequence[Draft]) -> None:
        if len(self.lost) > 40:
            return
        worst = max((one for draft in made for one in draft.short), key=lambda s: s.needed, default=None)
        if worst is None:
            reason = "it offers no device"
        else:
            reason = f"needs {bytes_text(worst.needed)} on {worst.device}, {bytes_text(worst.room)} are there"
        self.lost.append(Alternative(f"{head.name} alone", 0.0, reason))

    def against_split(self, alone: Draft) -> Draft:
        """The split instead, where the machine alone would compute on its processor and it pays clearly."""
        if not self.wish.distributed or not alone.on_host or len(self.fleet.machines) == 1:
            return alone
        if not any(spot.kind is Kind.GPU for spots in self.spots.values() for spot in spots):
            return alone
        split = self.split()
        if split is None:
            return alone
        if split.seconds * CLEAR_GAIN > alone.seconds:
            self._lose(split, "not clearly faster than one machine, which needs no other")
            return alone
        self._lose(alone, "its processor would have to compute, and several machines are clearly faster")
        return split

    # Several machines

    def split(self) -> Draft | None:
        """The best split over several machines by the wish's policy."""
        if self.wish.fixed:
            return self._fixed()
        if not self.wish.distributed:
            return None
        if sum(machine.room for machine in self.fleet.machines) < self.needed:
            return None
        heads = sorted(self.heads(), key=self._promise)
        heads = heads[: HEADS if len(self.fleet.machines) <= MANY else HEADS // 2]
        best: Draft | None = None
        for head in heads:
            links = links_between(self.fleet.machines, head)
            if self.wish.policy is Policy.FASTEST:
                found = self._fastest(head, links, best.seconds if best is not None else inf)
            else:
                found = self._proportional(head, links)
            if found is None:
                continue
            if best is None or found.seconds < best.seconds * 0.999:
                best, found = found, best
            if found is not None:
                self._lose(found, f"slower than with {best.head.name} as the head")
        return best

    def _promise(self, head: Machine) -> tuple[float, str]:
        """Seconds a byte and hops if ``head`` held what fits it: the fewer the better a head it is."""
        left, cost = float(self.needed), 0.0
        for spot in sorted(self.spots[head.node], key=lambda s: speed.seconds_per_byte(s, self.correction)):
            held = min(left, spot.room)
            cost += held * speed.seconds_per_byte(spot, self.correction)
            left -= held
        trips = sorted(link.round_trip for _, link in head.links)[:3]
        return cost + left / 10e9 + sum(trips), head.node

    def _fastest(self, head: Machine, links: Mapping[str, Link], below: float) -> Draft | None:
        own = self.spots[head.node]
        cpu = next((spot for spot in own if spot.kind is Kind.CPU), None)
        gpu_head = any(spot.kind is Kind.GPU for spot in own)
        others = [
            spot
            for machine in self.fleet.machines
            for spot in self.spots[machine.node]
            if not (spot.node == head.node and spot.kind is Kind.CPU)
        ]
        found = []
        line = [*others, cpu] if cpu is not None and not gpu_head else others
        bins = [(spot, self._bin(spot, head, links, copies=True)) for spot in line]
        found.append(self._search(head, bins, links, below))
        if cpu is not None:
            if found[0] is not None:
                below = min(below, found[0].seconds)
            bins = [(spot, self._bin(spot, head, links, copies=False)) for spot in others]
            found.append(self._search(head, [*bins, (cpu, self._host_bin(cpu, head))], links, below))
        fitting = [one for one in found if one is not None]
        if not fitting:
            return None
        best = min(fitting, key=lambda one: (one.seconds, len(one.shares)))
        for other in fitting:
            if other is not best and other.shares != best.shares:
                way = "its processor computing the first layers" if other.on_host else "a worker of its own"
                self._lose(other, f"{head.name} with {way} is slower")
        return best

    def _search(
        self,
        head: Machine,
        bins: Sequence[tuple[Spot, Bin]],
        links: Mapping[str, Link],
        below: float = inf,
    ) -> Draft | None:
        """The fastest split over these devices, worked out and checked to the byte.

        ``below``: only one quicker than this is of interest.
        """
        tight = [one for _, one in bins]
        for _ in range(RETRIES):
            split = best_split(
                self.memory,
                self.footprint.active,
                tight,
                most=MOST_DEVICES,
                workers=self.wish.workers,
                below=below,
            )
            if split is None:
                return None
            on_host = 0
            holds: list[Hold] = []
            for index, first, last in split.runs:
                if bins[index][1].first:
                    on_host = last
                else:
                    holds.append((bins[index][0], first, last))
            made = self._draft(head, on_host, holds, links)
            if not made.short:
                return None if self.wish.always and len(made.nodes) == 1 else made
            # The buffers of these very layers are larger than those the search reckoned with.
            over = {short.node: short.needed - short.room for short in made.short}
            tight = [
                replace(one, room=one.room - more, room_last=one.room_last - more)
                if (more := over.get(spot.node, 0))
                else one
                for (spot, _), one in zip(bins, tight, strict=True)
            ]
        return None

    def _bin(self, spot: Spot, head: Machine, links: Mapping[str, Link], *, copies: bool) -> Bin:
        """A device as the search sees it; ``copies``: batches will be pipelined over the devices."""
        footprint = self.footprint
        link = link_to(head, spot, links)
        local = spot.node == head.node
        offloaded = self.total if copies else self.total - 1
        key = local, copies
        if key not in self.buffers:
            self.buffers[key] = (
                footprint.compute(0, footprint.layers, devices=2, local=local, offloaded=offloaded),
                footprint.compute(0, self.total, devices=2, local=local, offloaded=offloaded),
            )
        middle, last = self.buffers[key]
        peak = footprint.largest_tensor if link is not None and spot.kind is Kind.CPU else 0
        slower = self.correction(spot.node, speed.HOP) if link is not None else 1.0
        room = spot.room - spot.overhead
        cpu = head.cpu
        if local and cpu is not None and cpu.memory == spot.memory:
            room -= host_share(head, footprint, 0, 2).total
        return Bin(
            rate=speed.seconds_per_byte(spot, self.correction),
            hop=slower * speed.hop_seconds(link, footprint.n_embd) if link is not None else 0.0,
            tail=slower * speed.logits_seconds(link, footprint.n_vocab) if link is not None else 0.0,
            room=room - max(middle, peak),
            room_last=room - max(last, peak),
            group=self._group(spot),
            worker=self.numbers[spot.node] if spot.node != head.node else -1,
        )

    def _host_bin(self, cpu: Spot, head: Machine) -> Bin:
        """The head's processor holding the first layers itself."""
        base = self.footprint.host_weights + self.footprint.host_buffers + cpu.overhead
        compute = self.footprint.host_compute(devices=2, offloaded=1)
        room = cpu.room - base - max(compute, self.footprint.largest_tensor)
        return Bin(
            rate=speed.seconds_per_byte(cpu, self.correction),
            hop=0.0,
            tail=0.0,
            room=room,
            room_last=0,
            group=self._group(cpu),
            first=True,
        )

    def _group(self, spot: Spot) -> int:
        """One number for the devices that share a memory: only one of them is used."""
        return self.numbers[spot.node] if spot.pool else -1

    # Policies that are not after speed

    def _proportional(self, head: Machine, links: Mapping[str, Link]) -> Draft | None:
        line: list[tuple[Spot, Room]] = []
        machines = [self.fleet.machine(node) for node in self.spots]
        for machine in machines:
            if machine is None:
                continue
            spots = self.spots[machine.node]
            gpus = [spot for spot in spots if spot.kind is Kind.GPU]
            for spot in gpus or spots:
                one = self._bin(spot, head, links, copies=True)
                if max(one.room, one.room_last) > 0:
                    line.append((spot, Room(max(one.room, 0), max(one.room_last, 0))))
        line.sort(key=lambda pair: (-pair[1].middle, pair[0].node, pair[0].device))
        line = self._within_workers(line, head)
        counts = range(1, len(line) + 1)
        if self.wish.policy is Policy.SPREAD:
            counts = range(len(line), 0, -1)
        for count in counts:
            # The head's own devices end the line, so that the logits need no network.
            chosen = sorted(line[:count], key=lambda pair: pair[0].node == head.node)
            rooms = [room for _, room in chosen]
            share_out = by_count if self.wish.policy is Policy.EVEN else by_room
            runs = share_out(self.memory, rooms)
            if runs is None:
                continue
            holds = [
                (spot, first, last)
                for (spot, _), (first, last) in zip(chosen, runs, strict=True)
                if last > first
            ]
            made = self._draft(head, 0, holds, links)
            if not made.short and not (self.wish.always and len(made.nodes) == 1):
                return made
        return None

    def _within_workers(self, line: list[tuple[Spot, Room]], head: Machine) -> list[tuple[Spot, Room]]:
        kept: list[tuple[Spot, Room]] = []
        workers: set[str] = set()
        for spot, room in line:
            if len(kept) == MOST_DEVICES:
                break
            if spot.node != head.node:
                if spot.node not in workers and len(workers) >= self.wish.workers:
                    continue
                workers.add(spot.node)
            kept.append((spot, room))
        return kept

    def _fixed(self) -> Draft | None:
        """The counts that the user fixed, each machine's shared out over its devices."""
        counts = list(self.wish.fixed)
        given = sum(count for _, count in counts)
        if counts and given == self.footprint.layers:
            counts[-1] = (counts[-1][0], counts[-1][1] + 1)
            given += 1
        if given != self.total:
            self.lost.append(
                Alternative(
                    "the fixed counts",
                    0.0,
                    f"they sum to {given}; the model has {self.footprint.layers} layers and the output: "
                    f"{self.total}",
                )
            )
            return None
        for head in sorted(self.heads(), key=lambda one: all(one.node != node for node, _ in counts)):
            made = self._fixed_on(head, counts)
            if made is None:
                continue
            if not made.short:
                return made
            worst = made.short[0]
            self.lost.append(
                Alternative(
                    f"the fixed counts with {head.name} as the head",
                    0.0,
                    f"{self.fleet.name(worst.node)} {worst.device} would need {bytes_text(worst.needed)}, "
                    f"{bytes_text(worst.room)} are there",
                )
            )
        return None

    def _fixed_on(self, head: Machine, counts: list[tuple[str, int]]) -> Draft | None:
        links = links_between(self.fleet.machines, head)
        on_host, at = 0, 0
        holds: list[Hold] = []
        for node, count in counts:
            spots = self.spots.get(node, ())
            gpus = [spot for spot in spots if spot.kind is Kind.GPU]
            spots = tuple(gpus) or spots
            if not spots:
                self.lost.append(Alternative("the fixed counts", 0.0, f"{node} is not there"))
                return None
            if node == head.node and not gpus and at == 0:
                on_host = at = count
                continue
            memory = self.memory[at : at + count]
            rooms = [Room(max(spot.room, 1), max(spot.room, 1)) for spot in spots]
            runs = by_room(memory, rooms) or [(0, count)]
            holds += [(s, at + a, at + b) for s, (a, b) in zip(spots, runs, strict=False) if b > a]
            at += count
        return self._draft(head, on_host, holds, links)

    # Both

    def _draft(self, head: Machine, on_host: int, holds: Sequence[Hold], links: Mapping[str, Link]) -> Draft:
        return draft(head, self.footprint, self.run, on_host, holds, links, self.correction, self.density)

    def _lose(self, one: Draft, reason: str) -> None:
        self.lost.append(
            Alternative(describe(one, self.fleet), 1 / one.seconds if one.seconds > 0 else 0.0, reason)
        )


def describe(one: Draft, fleet: Fleet) -> str:
    """A placement in a few words: ``a alone``, ``a with b and c``."""
    others = [fleet.name(node) for node in one.nodes[1:]]
    if not others:
        return f"{one.head.name} alone"
    return f"{one.head.name} with {', '.join(others)}"


def _ranked(lost: Sequence[Alternative], best: Draft) -> tuple[Alternative, ...]:
    """The alternatives once each, the fastest first, those that do not fit last."""
    once: dict[str, Alternative] = {}
    for one in lost:
        known = once.get(one.what)
        if known is None or one.tokens_per_second > known.tokens_per_second:
            once[one.what] = one
    return tuple(sorted(once.values(), key=lambda one: -one.tokens_per_second)[:12])


def _why(wish: Wish, fleet: Fleet, best: Draft, footprint: Footprint) -> list[str]:
    """Sentences for a person."""
    size = sum(share.total for share in (best.host, *best.shares))
    head = best.head.name
    devices = [share.device for share in best.shares]
    if len(best.nodes) == 1:
        where = " and ".join(devices) if devices else "the processor"
        if devices and best.on_host:
            where += f", the first {best.host.layers} layers on the processor"
        return [f"It fits {head} alone ({bytes_text(size)} on {where}), so no other machine slows it."]
    others = [fleet.name(node) for node in best.nodes[1:]]
    count = len(best.nodes)
    sentences = []
    if wish.fixed:
        sentences.append("The counts of layers were fixed by the caller.")
    elif wish.always:
        sentences.append(
            f"It is spread because the settings ask for it: {bytes_text(size)} on {count} machines."
        )
    else:
        sentences.append(
            f"No machine that has the file holds it alone ({bytes_text(size)}): "
            f"{head} runs it with {', '.join(others)}."
        )
    if wish.policy is Policy.FASTEST and not wish.fixed:
        sentences.append("Of the splits that fit, this one has the least predicted time per token.")
    elif not wish.fixed:
        sentences.append(f"The layers are shared out by the policy {wish.policy.value}.")
    hops = [share for share in best.shares if is_worker(best.head, _spot_of(fleet, share.node, share.device))]
    if hops:
        sentences.append(
            f"Each token makes {len(hops)} round trip{'s' if len(hops) != 1 else ''} to workers."
        )
    if best.on_host:
        sentences.append(f"The first {best.host.layers} layers stay on {head}'s processor, without a hop.")
    return sentences


def _spot_of(fleet: Fleet, node: str, device: str) -> Spot:
    machine = fleet.machine(node)
    spot = machine.spot(device) if machine is not None else None
    return spot or Spot(node, device, Kind.CPU if device == "CPU" else Kind.GPU, 0)
