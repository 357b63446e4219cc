"""The search for one setting of context and slots: what its ways to place a model share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from sollold.machine.device import Kind
from sollold.machine.plain import plain_address
from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement import speed
from sollold.placement.arrange import Bin
from sollold.placement.draft import Draft, Hold, draft, host_share, link_to
from sollold.placement.fleet import Fleet, Link, Machine, Spot
from sollold.placement.split import best_split
from sollold.placement.wish import MOST_DEVICES, Wish

RETRIES = 4


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was considered and lost. ``tokens_per_second`` 0.0: it does not fit."""

    what: str
    tokens_per_second: float
    reason: str


class Rung:
    """One setting on one fleet. ``lost`` gathers what was considered and did not win."""

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
        computing = dict.fromkeys(machine.node for machine in fleet.machines)
        computing |= dict.fromkeys(spot.machine for machine in fleet.machines for spot in machine.spots)
        self.numbers = {name: number for number, name in enumerate(computing)}
        self.buffers: dict[bool, tuple[int, int]] = {}
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

    def heads(self) -> list[Machine]:
        """Machines that can be the head."""
        return [
            machine
            for machine in self.fleet.machines
            if machine.holds and self.wish.head in ("", machine.node)
        ]

    def search(
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
            made = self.draft(head, on_host, holds, links)
            if not made.short:
                return None if self.wish.always and made.alone else made
            # The buffers of these very layers are larger than those the search reckoned with.
            over = {short.node: short.needed - short.room for short in made.short}
            tight = [
                replace(one, room=one.room - more, room_last=one.room_last - more)
                if (more := over.get(spot.node, 0))
                else one
                for (spot, _), one in zip(bins, tight, strict=True)
            ]
        return None

    def bin(self, spot: Spot, head: Machine, links: Mapping[str, Link], *, copies: bool) -> Bin:
        """A device as the search sees it; ``copies``: batches will be pipelined over the devices."""
        footprint = self.footprint
        link = link_to(head, spot, links)
        offloaded = self.total if copies else self.total - 1
        if copies not in self.buffers:
            self.buffers[copies] = (
                footprint.compute(0, footprint.layers, devices=2, offloaded=offloaded),
                footprint.compute(0, self.total, devices=2, offloaded=offloaded),
            )
        middle, last = self.buffers[copies]
        peak = footprint.largest_tensor if link is not None and spot.kind is not Kind.GPU else 0
        slower = self.correction(spot.node, speed.HOP) if link is not None else 1.0
        room = spot.room - spot.overhead
        cpu = head.cpu
        if spot.node == head.node and cpu is not None and cpu.memory == spot.memory:
            room -= host_share(head, footprint, 0, 2).total
        return Bin(
            rate=speed.seconds_per_byte(spot, self.correction),
            hop=slower * speed.hop_seconds(link, footprint.n_embd) if link is not None else 0.0,
            tail=slower * speed.logits_seconds(link, footprint.n_vocab) if link is not None else 0.0,
            room=room - max(middle, peak),
            room_last=room - max(last, peak),
            group=self._group(spot),
            worker=self.numbers[spot.machine] if spot.machine != head.node else -1,
        )

    def host_bin(self, cpu: Spot, head: Machine) -> Bin:
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

    def draft(self, head: Machine, on_host: int, holds: Sequence[Hold], links: Mapping[str, Link]) -> Draft:
        """Work a placement out to the byte; it may not fit."""
        return draft(head, self.footprint, self.run, on_host, holds, links, self.correction, self.density)

    def lose(self, one: Draft, reason: str) -> None:
        """Remember a placement that did not win, and why."""
        self.lost.append(
            Alternative(describe(one, self.fleet), 1 / one.seconds if one.seconds > 0 else 0.0, reason)
        )


def plain_of(one: Draft) -> list[str]:
    """The workers that others started among the devices of a placement, as people call them."""
    addresses = dict.fromkeys(plain_address(share.device) for share in one.shares)
    return [f"the plain worker {address}" for address in addresses if address]


def describe(one: Draft, fleet: Fleet) -> str:
    """A placement in a few words: ``a alone``, ``a with b and c``."""
    others = [fleet.name(node) for node in one.nodes[1:]] + plain_of(one)
    if not others:
        return f"{one.head.name} alone"
    return f"{one.head.name} with {', '.join(others)}"
