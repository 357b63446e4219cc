"""A placement worked out to the byte: who holds which layers, what that takes, how fast it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR, Kind
from sollold.machine.external_worker import external_address
from sollold.models.footprint.footprint import Footprint
from sollold.models.footprint.run_options import Run
from sollold.placement import cost_model
from sollold.placement.inventory import DeviceCapacity, Link, Machine, joined
from sollold.placement.plan import Plan, Share
from sollold.placement.request import PlacementRequest

CROSSING_SECONDS = 1.0
"""A checkpoint that takes longer to cross the network is not made: each prompt would wait for two of them."""
NONE_KEPT: Mapping[str, int] = MappingProxyType({})

Hold = tuple[DeviceCapacity, int, int]
"""A device with the run of layers that it holds: first, last (exclusive)."""


@dataclass(frozen=True, slots=True)
class DeviceShortfall:
    """A device that would have to hold more than it can: bytes."""

    node: str
    device: str
    needed: int
    room: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that may fit.

    ``seconds``: per token; ``short``: where it does not fit; ``checkpoints``: that each slot keeps;
    ``cpu_moe``: of so many first layers the head's processor keeps the experts. What drafts tokens is as in
    `Plan`; ``gain``: how many times as fast that makes an answer, predicted.
    """

    head: Machine
    run: Run
    checkpoints: int
    host: Share
    shares: tuple[Share, ...]
    seconds: float
    prompt_seconds: float
    load: float
    short: tuple[DeviceShortfall, ...]
    cpu_moe: int = 0
    estimate: bool = False
    parts: tuple[cost_model.Part, ...] = ()
    drafts_by: str = ""
    draft_digest: str = ""
    draft_device: str = ""
    gain: float = 1.0

    @property
    def nodes(self) -> tuple[str, ...]:
        """The head, then the machines with workers, in layer order."""
        found = dict.fromkeys([self.head.node, *(share.node for share in self.shares)])
        return tuple(found)

    @property
    def alone(self) -> bool:
        """Whether one machine does it all, without even a worker that others started."""
        return len(self.nodes) == 1 and not any(external_address(share.device) for share in self.shares)

    @property
    def on_host(self) -> bool:
        """Whether layers, or experts of layers, are computed by the head's processor itself."""
        return self.host.layers > 0 or self.cpu_moe > 0

    def plan(
        self, request: PlacementRequest, layers: int, reasons: Sequence[str], *, windowed: bool = False
    ) -> Plan:
        """The plan to be carried out."""
        return Plan(
            model=request.model,
            digest=request.digest,
            head=self.head.node,
            layers=layers,
            run=replace(self.run, checkpoints=self.checkpoints),
            host=self.host,
            shares=self.shares,
            cpu_moe=self.cpu_moe,
            estimate=self.estimate,
            tokens_per_second=self.gain / self.seconds if self.seconds > 0 else 0.0,
            load_seconds=self.load,
            reasons=tuple(reasons),
            asked=request.asked,
            template=request.template,
            drafts_by=self.drafts_by,
            draft_digest=self.draft_digest,
            draft_device=self.draft_device,
            windowed=windowed,
        )


def is_worker(head: Machine, capacity: DeviceCapacity) -> bool:
    """Whether the device needs a worker: it is elsewhere, or the head's processor in the line."""
    return capacity.node != head.node or capacity.kind is not Kind.GPU


def link_to(head: Machine, capacity: DeviceCapacity, links: Mapping[str, Link]) -> Link | None:
    """The way from the head to a device; None where the head computes itself."""
    way = links.get(capacity.node, Link()) if capacity.node != head.node else None
    if capacity.kind is Kind.EXTERNAL:
        # Behind the node that names it; how far is not measured, since only its one client may ask it.
        return joined(way, Link())
    return way or (cost_model.LOOPBACK if capacity.kind is Kind.CPU else None)


def share_overhead(capacity: DeviceCapacity, worker: bool, largest: int, state: int, compute: int) -> int:
    """Bytes besides tensors and buffers: a process, and the peak of loading.

    While a processor's worker loads, the largest tensor that it is sent is in memory once more; that is over
    before the state and the compute buffers are allocated.
    """
    peak = max(0, largest - state - compute) if worker and capacity.kind is not Kind.GPU else 0
    return capacity.overhead + peak


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
    return Share(head.node, PROCESSOR, 0, layers, weights, state, compute, overhead)


def evaluate(
    head: Machine,
    footprint: Footprint,
    run: Run,
    on_host: int,
    holds: Sequence[Hold],
    links: Mapping[str, Link],
    correction: cost_model.Correction = cost_model.uncorrected,
    parameters_per_byte: float = 0.0,
    cached: Mapping[str, int] = NONE_KEPT,
    cpu_moe: int = 0,
) -> Candidate:
    """Work a placement out.

    Args:
        head: where llama-server runs.
        footprint, run: the model's, and how it runs.
        on_host: how many first layers the head's processor computes.
        holds: the devices with their layers, in order.
        links: node → link from the head.
        correction: of the devices' speeds.
        parameters_per_byte: weights a byte of the model's tensors, for predicting prompts.
        cached: node → bytes of the model that its workers have on disk.
        cpu_moe: of so many first layers the head's processor keeps the experts; then one device holds all.
    """
    total = footprint.layers + 1
    crossing = _crossing(head, footprint, holds, links) if footprint.checkpoints else 0.0
    checkpoints = footprint.checkpoints if crossing <= CROSSING_SECONDS else 0
    host = host_share(head, footprint, on_host, len(holds), checkpoints=checkpoints > 0)
    seeing = next((i for i, (capacity, _, _) in enumerate(holds) if _is_gpu_of(head, capacity)), -1)
    kept, kept_active = sum(footprint.experts[:cpu_moe]), footprint.active_experts(cpu_moe)
    host = replace(
        host,
        weights=(host.weights if seeing < 0 else max(host.weights - footprint.projector, 0)) + kept,
        compute=host.compute + footprint.host_experts(cpu_moe),
    )
    shares, parts = [], _parts_of_host(head, footprint, on_host, cpu_moe)
    for index, hold in enumerate(holds):
        capacity, first, last = hold
        link = link_to(head, capacity, links)
        weights = sum(footprint.weights[first:last]) + footprint.projector * (index == seeing) - kept
        compute = footprint.compute(first, last, devices=len(holds), offloaded=total - on_host)
        compute += footprint.lent_experts(cpu_moe)
        shares.append(_share(hold, footprint, weights, compute, remote=link is not None))
        active = sum(footprint.active[first:last]) - kept_active
        parts.append(cost_model.Part(capacity, active, weights, link, last == total))
    return Candidate(
        head=head,
        run=run,
        checkpoints=checkpoints,
        host=host,
        shares=tuple(shares),
        seconds=cost_model.decode_seconds(parts, footprint.n_embd, footprint.n_vocab, correction),
        prompt_seconds=cost_model.prefill_seconds(parts, footprint.n_embd, parameters_per_byte),
        load=cost_model.load_seconds(parts, footprint.host_weights, cached),
        short=tuple(_short(_taken(head, holds, (host, *shares)))),
        cpu_moe=cpu_moe,
        estimate=footprint.estimate,
        parts=tuple(parts),
    )


def _share(hold: Hold, footprint: Footprint, weights: int, compute: int, *, remote: bool) -> Share:
    """What a device's layers need, besides ``weights`` and ``compute`` bytes."""
    capacity, first, last = hold
    state = sum(footprint.state[first:last])
    largest = max(footprint.largest[first:last], default=0)
    overhead = share_overhead(capacity, remote, largest, state, compute)
    return Share(capacity.node, capacity.device, first, last, weights, state, compute, overhead)


def _parts_of_host(head: Machine, footprint: Footprint, on_host: int, cpu_moe: int) -> list[cost_model.Part]:
    """What the head's processor computes: experts that it keeps, and the first layers."""
    parts = []
    if cpu_moe and head.cpu is not None:
        kept, active = sum(footprint.experts[:cpu_moe]), footprint.active_experts(cpu_moe)
        parts.append(cost_model.Part(head.cpu, active, kept, None, False))
    if on_host and head.cpu is not None:
        weights, active = sum(footprint.weights[:on_host]), sum(footprint.active[:on_host])
        parts.append(cost_model.Part(head.cpu, active, weights, None, on_host > footprint.layers))
    return parts


def _taken(head: Machine, holds: Sequence[Hold], shares: Sequence[Share]) -> dict[DeviceCapacity, int]:
    """Bytes that the shares take of each device."""
    capacities = {(capacity.node, capacity.device): capacity for capacity, _, _ in holds}
    if head.cpu is not None:
        capacities[head.node, PROCESSOR] = head.cpu
    taken: dict[DeviceCapacity, int] = {}
    for share in shares:
        capacity = capacities.get((share.node, share.device))
        if capacity is not None:
            taken[capacity] = taken.get(capacity, 0) + share.total
    return taken


def _short(taken: Mapping[DeviceCapacity, int]) -> Iterator[DeviceShortfall]:
    """Where more is taken than there is: of a device for itself, or of all that share its memory."""
    together: dict[tuple[str, str], list[DeviceCapacity]] = {}
    for capacity, size in taken.items():
        together.setdefault(capacity.memory, []).append(capacity)
        if size > capacity.room:
            yield DeviceShortfall(capacity.node, capacity.device, size, capacity.room)
    for members in together.values():
        size, room = sum(taken[capacity] for capacity in members), max(capacity.room for capacity in members)
        if len(members) > 1 and size > room and all(taken[capacity] <= capacity.room for capacity in members):
            yield DeviceShortfall(members[-1].node, members[-1].device, size, room)


def _is_gpu_of(head: Machine, capacity: DeviceCapacity) -> bool:
    """Whether llama-server itself computes on the device: the projector may lie there, and nowhere else."""
    return capacity.node == head.node and capacity.kind is Kind.GPU


def _crossing(head: Machine, footprint: Footprint, holds: Sequence[Hold], links: Mapping[str, Link]) -> float:
    """Seconds that the state of the layers elsewhere takes to the head, device after device."""
    return sum(
        sum(footprint.snapshots[first:last]) / links.get(capacity.node, Link()).bandwidth
        for capacity, first, last in holds
        if capacity.node != head.node
    )
