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
from sollold.placement.arrange import Bin, Buffers
from sollold.placement.draft import Draft, Hold, draft, host_share, link_to
from sollold.placement.fleet import Fleet, Link, Machine, Spot
from sollold.placement.split import best_split
from sollold.placement.wish import MOST_DEVICES, Wish

RETRIES = 4
LIKED = 0.02
"""Share by which a device may be slower than others and be taken, since its machine has kept the tensors."""
FEW = 16
"""Machines up to which buffers that differ from layer to layer are looked at one by one."""


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
        self._buffers: dict[bool, Buffers] = {}
        self._hosts: dict[str, int] = {}
        self.cached = {machine.node: machine.cached for machine in fleet.machines if machine.cached}
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

    def may_head(self, head: Machine) -> bool:
        """Whether a machine has room for what its processor keeps at the least, with all layers elsewhere."""
        cpu = head.cpu
        if cpu is None:
            return True
        least = host_share(head, self.footprint, 0, 1, checkpoints=False).total
        if any(spot.kind is Kind.GPU for spot in self.spots[head.node]):
            least -= self.footprint.projector
        return least <= cpu.room

    def search(
        self,
        head: Machine,
        bins: Sequence[tuple[Spot, Bin]],
        links: Mapping[str, Link],
        below: float = inf,
    ) -> Draft | None:
        """The fastest split over these devices, worked out and checked to the byte.

        Where one of them is the head's processor with the first layers (`host_bin`), it holds some.
        ``below``: only one quicker than this is of interest.
        """
        tight = [one for _, one in bins]
        host = any(one.first for one in tight)
        for _ in range(RETRIES):
            split = best_split(
                self.memory,
                self.footprint.active,
                tight,
                weights=self.footprint.weights,
                # With the first layers on the head's processor batches are not pipelined.
                buffers=self.buffers(piped=not host),
                most=MOST_DEVICES,
                workers=self.wish.workers,
                host=host,
                apart=self.wish.always,
                below=below,
                largest=self.footprint.largest,
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
                return made
            # The buffers of these very layers are larger than those the search reckoned with.
            over = {(short.node, short.device): short.needed - short.room for short in made.short}
            tight = [
                replace(one, room=one.room - more) if (more := over.get((spot.node, spot.device), 0)) else one
                for (spot, _), one in zip(bins, tight, strict=True)
            ]
        return None

    def buffers(self, *, piped: bool) -> Buffers:
        """Compute buffers beside a device's layers when the model is split; ``piped``: none on the host."""
        if piped not in self._buffers:
            layers = self.footprint.layers
            known: dict[tuple[int, int], int] = {}

            def exact(first: int, last: int) -> int:
                size = known.get((first, last))
                if size is None:
                    size = known[first, last] = self.footprint.compute(
                        first, last, devices=2, offloaded=self.total if piped else layers
                    )
                return size

            middle = exact(min(1, layers), layers)
            few = len(self.numbers) <= FEW
            least = min((exact(first, first + 1) for first in range(1, layers)), default=middle) if few else 0
            self._buffers[piped] = Buffers(
                begins=max(exact(0, layers), middle),
                middle=middle,
                ends=exact(min(1, layers), self.total),
                output=exact(layers, self.total),
                # What differs from layer to layer is worth its time only where every byte may count.
                exact=exact if few else None,
                least=least,
            )
        return self._buffers[piped]

    def bin(self, spot: Spot, head: Machine, links: Mapping[str, Link]) -> Bin:
        """A device as the search sees it."""
        footprint = self.footprint
        link = link_to(head, spot, links)
        room = spot.room - spot.overhead
        if spot.node == head.node:
            room -= self._host_bytes(head, spot)
        hop = tail = 0.0
        liked = 1 - self._kept(spot, head) * LIKED
        if link is not None:
            slower = self.correction(spot.node, speed.HOP) * liked
            hop = slower * speed.hop_seconds(link, footprint.n_embd)
            tail = slower * speed.logits_seconds(link, footprint.n_vocab)
        return Bin(
            rate=speed.seconds_per_byte(spot, self.correction) * liked,
            hop=hop,
            tail=tail,
            room=room,
            loading=room if link is not None and spot.kind is not Kind.GPU else None,
            group=self._group(spot),
            worker=self.numbers[spot.machine] if spot.machine != head.node else -1,
        )

    def _kept(self, spot: Spot, head: Machine) -> float:
        """Which part of what the device could hold its machine has on disk."""
        if spot.node == head.node:
            return 0.0
        size = self.cached.get(spot.node, 0)
        return min(1.0, size / max(min(self.needed, spot.room), 1)) if size else 0.0

    def _host_bytes(self, head: Machine, spot: Spot) -> int:
        """Bytes in the memory of one of the head's devices that stay there with all layers elsewhere."""
        cpu = head.cpu
        if cpu is None or cpu.memory != spot.memory:
            return 0
        if head.node not in self._hosts:
            self._hosts[head.node] = host_share(head, self.footprint, 0, 2).total
        return self._hosts[head.node]

    def host_bin(self, cpu: Spot, head: Machine) -> Bin:
        """The head's processor holding the first layers itself."""
        room = cpu.room - cpu.overhead - self.footprint.host_weights
        buffers = self.footprint.host_buffers + self.footprint.host_compute(devices=2, offloaded=1)
        return Bin(
            rate=speed.seconds_per_byte(cpu, self.correction),
            hop=0.0,
            tail=0.0,
            room=room - buffers,
            loading=room - self.footprint.largest_tensor,
            group=self._group(cpu),
            first=True,
        )

    def _group(self, spot: Spot) -> int:
        """One number for the devices that share a memory: only one of them is used."""
        return self.numbers[spot.node] if spot.pool else -1

    def draft(self, head: Machine, on_host: int, holds: Sequence[Hold], links: Mapping[str, Link]) -> Draft:
        """Work a placement out to the byte; it may not fit."""
        return draft(
            head,
            self.footprint,
            self.run,
            on_host,
            holds,
            links,
            self.correction,
            self.density,
            self.cached,
        )

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
