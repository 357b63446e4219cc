"""A placement worked out to the byte: who holds which layers, what that takes, how fast it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sollold.machine.device import Kind
from sollold.machine.plain import plain_address
from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement import speed
from sollold.placement.fleet import Link, Machine, Spot, joined
from sollold.placement.plan import Plan, Share
from sollold.placement.wish import Wish

CROSSING_SECONDS = 1.0
"""A checkpoint that takes longer to cross the network is not made: each prompt would wait for two of them."""
NONE_KEPT: Mapping[str, int] = MappingProxyType({})

Hold = tuple[Spot, int, int]
"""A device with the run of layers that it holds: first, last (exclusive)."""


@dataclass(frozen=True, slots=True)
class Short:
    """A device that would have to hold more than it can: bytes."""

    node: str
    device: str
    needed: int
    room: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A placement that may fit.

    ``seconds``: per token; ``short``: where it does not fit; ``checkpoints``: that each slot keeps;
    ``cpu_moe``: of so many first layers the head's processor keeps the experts.
    """

    head: Machine
    run: Run
    checkpoints: int
    host: Share
    shares: tuple[Share, ...]
    seconds: float
    prompt_seconds: float
    load: float
    short: tuple[Short, ...]
    cpu_moe: int = 0
    estimate: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        """The head, then the machines with workers, in layer order."""
        found = dict.fromkeys([self.head.node, *(share.node for share in self.shares)])
        return tuple(found)

    @property
    def alone(self) -> bool:
        """Whether one machine does it all, without even a worker that others started."""
        return len(self.nodes) == 1 and not any(plain_address(share.device) for share in self.shares)

    @property
    def on_host(self) -> bool:
        """Whether layers, or experts of layers, are computed by the head's processor itself."""
        return self.host.layers > 0 or self.cpu_moe > 0

    def plan(self, wish: Wish, layers: int, reasons: Sequence[str]) -> Plan:
        """The plan to be carried out."""
        return Plan(
            model=wish.model,
            digest=wish.digest,
            head=self.head.node,
            layers=layers,
            run=replace(self.run, checkpoints=self.checkpoints),
            host=self.host,
            shares=self.shares,
            cpu_moe=self.cpu_moe,
            estimate=self.estimate,
            tokens_per_second=1 / self.seconds if self.seconds > 0 else 0.0,
            load_seconds=self.load,
            reasons=tuple(reasons),
            asked=wish.asked,
        )


def is_worker(head: Machine, spot: Spot) -> bool:
    """Whether the device needs a worker: it is elsewhere, or the head's processor in the line."""
    return spot.node != head.node or spot.kind is not Kind.GPU


def link_to(head: Machine, spot: Spot, links: Mapping[str, Link]) -> Link | None:
    """The way from the head to a device; None where the head computes itself."""
    way = links.get(spot.node, Link()) if spot.node != head.node else None
    if spot.kind is Kind.PLAIN:
        # Behind the node that names it; how far is not measured, since only its one client may ask it.
        return joined(way, Link())
    return way or (speed.LOOPBACK if spot.kind is Kind.CPU else None)


def share_overhead(spot: Spot, worker: bool, largest: int, state: int, compute: int) -> int:
    """Bytes besides tensors and buffers: a process, and the peak of loading.

    While a processor's worker loads, the largest tensor that it is sent is in memory once more; that is over
    before the state and the compute buffers are allocated.
    """
    peak = max(0, largest - state - compute) if worker and spot.kind is not Kind.GPU else 0
    return spot.overhead + peak


def host_share(
    head: Machine, footprint: Footprint, layers: int, devices: int, *, checkpoints: bool = True
) -> Share:
    """What stays with the head's processor when it computes the first ``layers`` itself.

    ``checkpoints``: those that the footprint has are kept.
    """
    cpu = head.cpu
    weights = footprint.host_tensors(layers)
    state = sum(footprint.state[:layers])
    offloaded = footprint.layers + 1 - layers
    compute = footprint.host_compute(devices=devices, offloaded=offloaded) + footprint.host_buffers
    if not checkpoints:
        compute = max(compute - footprint.checkpoint_bytes, 0)
    overhead = (cpu.overhead if cpu is not None else 0) + max(0, footprint.largest_tensor - state - compute)
    if cpu is None:
        # The processor is not offered, so its memory is nobody's to grant.
        weights = state = compute = overhead = 0
    return Share(head.node, "CPU", 0, layers, weights, state, compute, overhead)


def draft(
    head: Machine,
    footprint: Footprint,
    run: Run,
    on_host: int,
    holds: Sequence[Hold],
    links: Mapping[str, Link],
    correction: speed.Correction,
    parameters_per_byte: float = 0.0,
    cached: Mapping[str, int] = NONE_KEPT,
    cpu_moe: int = 0,
) -> Draft:
    """Work a placement out.

    Args:
        head: where llama-server runs.
        footprint: the model's, for ``run``.
        run: how it runs.
        on_host: how many first layers the head's processor computes.
        holds: the devices with their layers, in order.
        links: node → link from the head.
        correction: of the devices' speeds.
        parameters_per_byte: weights a byte of the model's tensors, for predicting prompts.
        cached: node → bytes of the model that its workers have on disk.
        cpu_moe: of so many first layers the head's processor keeps the experts; then one device holds all.
    """
    total = footprint.layers + 1
    offloaded = total - on_host
    checkpoints = footprint.checkpoints
    if checkpoints and _crossing(head, footprint, holds, links) > CROSSING_SECONDS:
        checkpoints = 0
    host = host_share(head, footprint, on_host, len(holds), checkpoints=checkpoints > 0)
    seeing = next((i for i, (spot, _, _) in enumerate(holds) if _is_gpu_of(head, spot)), -1)
    if seeing >= 0 and footprint.projector:
        host = replace(host, weights=max(host.weights - footprint.projector, 0))
    kept, kept_active = sum(footprint.experts[:cpu_moe]), footprint.active_experts(cpu_moe)
    if cpu_moe:
        host = replace(
            host, weights=host.weights + kept, compute=host.compute + footprint.host_experts(cpu_moe)
        )
    shares = []
    parts = []
    if kept and head.cpu is not None:
        parts.append(speed.Part(head.cpu, kept_active, kept, None, False))
    if on_host and head.cpu is not None:
        parts.append(
            speed.Part(
                head.cpu,
                sum(footprint.active[:on_host]),
                sum(footprint.weights[:on_host]),
                None,
                on_host == total,
            )
        )
    for index, (spot, first, last) in enumerate(holds):
        link = link_to(head, spot, links)
        weights = sum(footprint.weights[first:last]) + footprint.projector * (index == seeing) - kept
        state = sum(footprint.state[first:last])
        compute = footprint.compute(first, last, devices=len(holds), offloaded=offloaded)
        compute += footprint.lent_experts(cpu_moe)
        largest = max(footprint.largest[first:last], default=0)
        overhead = share_overhead(spot, link is not None, largest, state, compute)
        shares.append(Share(spot.node, spot.device, first, last, weights, state, compute, overhead))
        parts.append(
            speed.Part(spot, sum(footprint.active[first:last]) - kept_active, weights, link, last == total)
        )
    spots = {(spot.node, spot.device): spot for spot, _, _ in holds}
    if head.cpu is not None:
        spots[head.node, "CPU"] = head.cpu
    taken: dict[Spot, int] = {}
    for share in (host, *shares):
        where = spots.get((share.node, share.device))
        if where is not None:
            taken[where] = taken.get(where, 0) + share.total
    return Draft(
        head=head,
        run=run,
        checkpoints=checkpoints,
        host=host,
        shares=tuple(shares),
        seconds=speed.decode_seconds(parts, footprint.n_embd, footprint.n_vocab, correction),
        prompt_seconds=speed.prefill_seconds(parts, footprint.n_embd, parameters_per_byte),
        load=speed.load_seconds(parts, footprint.host_weights, cached),
        short=tuple(_short(taken)),
        cpu_moe=cpu_moe,
        estimate=footprint.estimate,
    )


def _short(taken: Mapping[Spot, int]) -> Iterator[Short]:
    """Where more is taken than there is: of a device for itself, or of all that share its memory."""
    together: dict[tuple[str, str], list[Spot]] = {}
    for spot, size in taken.items():
        together.setdefault(spot.memory, []).append(spot)
        if size > spot.room:
            yield Short(spot.node, spot.device, size, spot.room)
    for members in together.values():
        size, room = sum(taken[spot] for spot in members), max(spot.room for spot in members)
        if len(members) > 1 and size > room and all(taken[spot] <= spot.room for spot in members):
            yield Short(members[-1].node, members[-1].device, size, room)


def _is_gpu_of(head: Machine, spot: Spot) -> bool:
    """Whether llama-server itself computes on the device: the projector may lie there, and nowhere else."""
    return spot.node == head.node and spot.kind is Kind.GPU


def _crossing(head: Machine, footprint: Footprint, holds: Sequence[Hold], links: Mapping[str, Link]) -> float:
    """Seconds that the state of the layers elsewhere takes to the head, device after device."""
    return sum(
        sum(footprint.snapshots[first:last]) / links.get(spot.node, Link()).bandwidth
        for spot, first, last in holds
        if spot.node != head.node
    )
