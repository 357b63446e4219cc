"""Holds what all ways to place a model share in the search with one setting of context and slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from sollold.facts import dataclass
from sollold.machine.device import Kind
from sollold.machine.external_worker import external_address
from sollold.models.footprint.footprint import Footprint
from sollold.models.footprint.run_options import Run
from sollold.placement import cost_model
from sollold.placement.device_search import best_split
from sollold.placement.evaluate import Candidate, Hold, evaluate, host_share, link_to
from sollold.placement.inventory import DeviceCapacity, Fleet, Link, Machine
from sollold.placement.layer_runs import Bin, Buffers
from sollold.placement.request import MOST_DEVICES, PlacementRequest

RETRIES = 4
CACHE_BONUS = 0.02
"""Bonus, as a share of the time, for a device whose machine has the tensors cached."""
FEW = 16
"""Maximum number of machines for which the exact buffers of each run of layers are considered."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was considered and lost; ``tokens_per_second`` is 0.0 if it does not fit."""

    what: str
    tokens_per_second: float
    reason: str


class SearchContext:
    """The search with one setting on one fleet; ``lost`` collects the placements that did not win."""

    def __init__(
        self,
        request: PlacementRequest,
        fleet: Fleet,
        footprint: Footprint,
        run: Run,
        correction: cost_model.Correction,
    ) -> None:
        self.request, self.fleet, self.footprint, self.run, self.correction = (
            request,
            fleet,
            footprint,
            run,
            correction,
        )
        self.total = footprint.layers + 1
        self.memory = [a + b for a, b in zip(footprint.weights, (*footprint.state, 0), strict=True)]
        self.needed = sum(self.memory)
        computing = dict.fromkeys(machine.node for machine in fleet.machines)
        computing |= dict.fromkeys(
            capacity.machine for machine in fleet.machines for capacity in machine.devices
        )
        self.numbers = {name: number for number, name in enumerate(computing)}
        self._buffers: dict[bool, Buffers] = {}
        self._hosts: dict[str, int] = {}
        self.cached = {machine.node: machine.cached for machine in fleet.machines if machine.cached}
        self.lost: list[Alternative] = []
        self.devices = {
            machine.node: tuple(device for device in machine.devices if _may_use(device, request.external))
            for machine in fleet.machines
        }
        weights = sum(footprint.weights)
        self.density = request.parameters / weights if weights else 0.0

    def heads(self) -> list[Machine]:
        """Return the machines that can be the head."""
        return [machine for machine in self.fleet.machines if machine.holds]

    def may_head(self, head: Machine) -> bool:
        """Return whether a machine has room for what its processor keeps even with all layers elsewhere."""
        cpu = head.cpu
        if cpu is None:
            return True
        min_bytes = host_share(head, self.footprint, 0, 1, checkpoints=False).total
        if any(capacity.kind is Kind.GPU for capacity in self.devices[head.node]):
            min_bytes -= self.footprint.projector
        return min_bytes <= cpu.room

    def split_over(
        self,
        head: Machine,
        bins: Sequence[tuple[DeviceCapacity, Bin]],
        links: Mapping[str, Link],
        below: float = inf,
    ) -> Candidate | None:
        """Return the fastest split over these devices, worked out and checked to the byte.

        If one of them is the head's processor with the first layers (`host_bin`), it must hold some. Splits
        that take ``below`` seconds or more are ignored.
        """
        tight = [device for _, device in bins]
        host = any(device.first for device in tight)
        for _ in range(RETRIES):
            split = best_split(
                self.memory,
                self.footprint.active,
                tight,
                weights=self.footprint.weights,
                # With the first layers on the head's processor, batches are not pipelined.
                buffers=self.buffers(piped=not host),
                most=MOST_DEVICES,
                workers=self.request.workers,
                host=host,
                apart=self.request.always,
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
            candidate = self.evaluate(head, on_host, holds, links)
            if not candidate.short:
                return candidate
            # The buffers of exactly these layers are larger than the search assumed.
            excess = {(short.node, short.device): short.needed - short.room for short in candidate.short}
            tight = [
                replace(device, room=device.room - extra)
                if (extra := excess.get((capacity.node, capacity.device), 0))
                else device
                for (capacity, _), device in zip(bins, tight, strict=True)
            ]
        return None

    def buffers(self, *, piped: bool) -> Buffers:
        """Return a device's compute buffers when the model is split.

        ``piped``: batches are pipelined, since the host holds no layers.
        """
        if piped not in self._buffers:
            layers = self.footprint.layers
            sizes: dict[tuple[int, int], int] = {}

            def exact(first: int, last: int) -> int:
                size = sizes.get((first, last))
                if size is None:
                    size = sizes[first, last] = self.footprint.compute(
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
                # The exact buffers are worth their time only with few machines, where every byte may count.
                exact=exact if few else None,
                least=least,
            )
        return self._buffers[piped]

    def bin(self, capacity: DeviceCapacity, head: Machine, links: Mapping[str, Link]) -> Bin:
        """Return a device as a bin of the search."""
        footprint = self.footprint
        link = link_to(head, capacity, links)
        room = capacity.room - capacity.overhead
        if capacity.node == head.node:
            room -= self._host_bytes(head, capacity)
        hop = tail = 0.0
        discount = 1 - self._cached_fraction(capacity, head) * CACHE_BONUS
        if link is not None:
            slowdown = self.correction(capacity.node, cost_model.HOP) * discount
            hop = slowdown * cost_model.hop_seconds(link, footprint.n_embd)
            tail = slowdown * cost_model.logits_seconds(link, footprint.n_vocab)
        return Bin(
            rate=cost_model.seconds_per_byte(capacity, self.correction) * discount,
            hop=hop,
            tail=tail,
            room=room,
            loading=room if link is not None and capacity.kind is not Kind.GPU else None,
            group=self._group(capacity),
            worker=self.numbers[capacity.machine] if capacity.machine != head.node else -1,
        )

    def _cached_fraction(self, capacity: DeviceCapacity, head: Machine) -> float:
        """Return the fraction of what the device could hold that its machine has on disk."""
        if capacity.node == head.node:
            return 0.0
        size = self.cached.get(capacity.node, 0)
        return min(1.0, size / max(min(self.needed, capacity.room), 1)) if size else 0.0

    def _host_bytes(self, head: Machine, capacity: DeviceCapacity) -> int:
        """Return the host's bytes with all layers elsewhere, if the device shares the processor's memory."""
        cpu = head.cpu
        if cpu is None or cpu.memory != capacity.memory:
            return 0
        if head.node not in self._hosts:
            self._hosts[head.node] = host_share(head, self.footprint, 0, 2).total
        return self._hosts[head.node]

    def host_bin(self, cpu: DeviceCapacity, head: Machine) -> Bin:
        """Return the bin of the head's processor, holding the first layers itself."""
        room = cpu.room - cpu.overhead - self.footprint.host_weights
        buffers = self.footprint.host_buffers + self.footprint.host_compute(devices=2, offloaded=1)
        return Bin(
            rate=cost_model.seconds_per_byte(cpu, self.correction),
            hop=0.0,
            tail=0.0,
            room=room - buffers,
            loading=room - self.footprint.largest_tensor,
            group=self._group(cpu),
            first=True,
        )

    def _group(self, capacity: DeviceCapacity) -> int:
        """Return one number for all devices that share a memory: only one of them is used. -1: not shared."""
        return self.numbers[capacity.node] if capacity.pool else -1

    def evaluate(
        self, head: Machine, on_host: int, holds: Sequence[Hold], links: Mapping[str, Link]
    ) -> Candidate:
        """Work out a placement to the byte; it may not fit."""
        return evaluate(
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

    def lose(self, loser: Candidate, reason: str) -> None:
        """Record a placement that did not win, and why."""
        self.lost.append(
            Alternative(describe(loser, self.fleet), 1 / loser.seconds if loser.seconds > 0 else 0.0, reason)
        )


def _may_use(capacity: DeviceCapacity, external: tuple[str, ...] | None) -> bool:
    """Return whether a device is a node's own, or that of an external worker that the caller allows."""
    address = external_address(capacity.device)
    return not address or external is None or address in external


def external_workers_of(candidate: Candidate) -> list[str]:
    """Return the external workers that a placement uses, described for display."""
    addresses = dict.fromkeys(external_address(share.device) for share in candidate.shares)
    return [f"the external worker {address}" for address in addresses if address]


def describe(candidate: Candidate, fleet: Fleet) -> str:
    """Describe a placement in a few words: ``a alone``, ``a with b, c``."""
    others = [fleet.name(node) for node in candidate.nodes[1:]] + external_workers_of(candidate)
    if not others:
        return f"{candidate.head.name} alone"
    return f"{candidate.head.name} with {', '.join(others)}"
