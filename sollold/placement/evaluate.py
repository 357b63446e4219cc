"""Works a placement out to the byte: which device holds which layers, the memory needed, and the speed."""

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
"""Longest transfer of a checkpoint, in seconds. Slower ones are disabled: each prompt would wait for two."""
NONE_KEPT: Mapping[str, int] = MappingProxyType({})

Hold = tuple[DeviceCapacity, int, int]
"""A device with the run of layers it holds: first, last (exclusive)."""


@dataclass(frozen=True, slots=True)
class DeviceShortfall:
    """A device that would have to hold more bytes than it has room for."""

    node: str
    device: str
    needed: int
    room: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that may fit.

    ``seconds``: time per token; ``short``: where it does not fit; ``checkpoints``: number that each slot
    keeps; ``cpu_moe``: number of first layers whose experts stay with the head's processor. The fields about
    drafts are as in `Plan`; ``gain``: predicted speed-up by drafts.
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
        """The head, then the nodes with workers, in layer order."""
        return tuple(dict.fromkeys([self.head.node, *(share.node for share in self.shares)]))

    @property
    def alone(self) -> bool:
        """Whether one machine does everything, without any external worker."""
        return len(self.nodes) == 1 and not any(external_address(share.device) for share in self.shares)

    @property
    def on_host(self) -> bool:
        """Whether llama-server computes layers, or experts of layers, on the head's processor."""
        return self.host.layers > 0 or self.cpu_moe > 0

    def plan(
        self, request: PlacementRequest, layers: int, reasons: Sequence[str], *, windowed: bool = False
    ) -> Plan:
        """Return the plan to carry out."""
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
    """Return whether the device needs a worker: all do except the head's own GPUs."""
    return capacity.node != head.node or capacity.kind is not Kind.GPU


def link_to(head: Machine, capacity: DeviceCapacity, links: Mapping[str, Link]) -> Link | None:
    """Return the link from the head to a device; None for the head's own GPUs."""
    link = links.get(capacity.node, Link()) if capacity.node != head.node else None
    if capacity.kind is Kind.EXTERNAL:
        # Reached through the node that lists it. The second link is not measured: it serves one client only.
        return joined(link, Link())
    return link or (cost_model.LOOPBACK if capacity.kind is Kind.CPU else None)


def share_overhead(capacity: DeviceCapacity, worker: bool, largest: int, state: int, compute: int) -> int:
    """Return the bytes besides tensors and buffers: those of the process, and the peak while loading.

    While a worker on a processor loads, the largest tensor it receives is in memory twice. That ends before
    the state and the compute buffers are allocated, so only the excess over them counts.
    """
    peak = max(0, largest - state - compute) if worker and capacity.kind is not Kind.GPU else 0
    return capacity.overhead + peak


def host_share(
    head: Machine, footprint: Footprint, layers: int, devices: int, *, checkpoints: bool = True
) -> Share:
    """Return what stays with the head's processor when it computes the first ``layers`` itself.

    ``checkpoints``: whether to count the footprint's context checkpoints.
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
        # The processor is not offered, so no node can grant its memory.
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
    """Work out a placement.

    Args:
        head: the machine that runs llama-server.
        on_host: number of first layers that the head's processor computes.
        holds: the devices with their layers, in order.
        links: links from the head, by node.
        correction: correction of the devices' speeds.
        parameters_per_byte: parameters per byte of the model's tensors, for predicting prompts.
        cached: bytes of the model that each node's workers have on disk, by node.
        cpu_moe: number of first layers whose experts stay with the head's processor; if not 0, one device
            holds everything else.
    """
    total = footprint.layers + 1
    crossing = _checkpoint_seconds(head, footprint, holds, links) if footprint.checkpoints else 0.0
    checkpoints = footprint.checkpoints if crossing <= CROSSING_SECONDS else 0
    host = host_share(head, footprint, on_host, len(holds), checkpoints=checkpoints > 0)
    gpu_index = next((i for i, (capacity, _, _) in enumerate(holds) if _is_gpu_of(head, capacity)), -1)
    experts, experts_active = sum(footprint.experts[:cpu_moe]), footprint.active_experts(cpu_moe)
    host = replace(
        host,
        weights=(host.weights if gpu_index < 0 else max(host.weights - footprint.projector, 0)) + experts,
        compute=host.compute + footprint.host_experts(cpu_moe),
    )
    shares, parts = [], _parts_of_host(head, footprint, on_host, cpu_moe)
    for index, hold in enumerate(holds):
        capacity, first, last = hold
        link = link_to(head, capacity, links)
        weights = sum(footprint.weights[first:last]) + footprint.projector * (index == gpu_index) - experts
        compute = footprint.compute(first, last, devices=len(holds), offloaded=total - on_host)
        compute += footprint.lent_experts(cpu_moe)
        shares.append(_share(hold, footprint, weights, compute, remote=link is not None))
        active = sum(footprint.active[first:last]) - experts_active
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
        short=tuple(_shortfalls(_bytes_taken(head, holds, (host, *shares)))),
        cpu_moe=cpu_moe,
        estimate=footprint.estimate,
        parts=tuple(parts),
    )


def _share(hold: Hold, footprint: Footprint, weights: int, compute: int, *, remote: bool) -> Share:
    """Return a device's share: ``weights`` and ``compute`` as given, with its state and overhead."""
    capacity, first, last = hold
    state = sum(footprint.state[first:last])
    largest = max(footprint.largest[first:last], default=0)
    overhead = share_overhead(capacity, remote, largest, state, compute)
    return Share(capacity.node, capacity.device, first, last, weights, state, compute, overhead)


def _parts_of_host(head: Machine, footprint: Footprint, on_host: int, cpu_moe: int) -> list[cost_model.Part]:
    """Return what the head's processor computes: the experts it keeps, and the first layers."""
    parts = []
    if cpu_moe and head.cpu is not None:
        experts, active = sum(footprint.experts[:cpu_moe]), footprint.active_experts(cpu_moe)
        parts.append(cost_model.Part(head.cpu, active, experts, None, False))
    if on_host and head.cpu is not None:
        weights, active = sum(footprint.weights[:on_host]), sum(footprint.active[:on_host])
        parts.append(cost_model.Part(head.cpu, active, weights, None, on_host > footprint.layers))
    return parts


def _bytes_taken(head: Machine, holds: Sequence[Hold], shares: Sequence[Share]) -> dict[DeviceCapacity, int]:
    """Return the bytes that the shares take from each device."""
    capacities = {(capacity.node, capacity.device): capacity for capacity, _, _ in holds}
    if head.cpu is not None:
        capacities[head.node, PROCESSOR] = head.cpu
    taken: dict[DeviceCapacity, int] = {}
    for share in shares:
        capacity = capacities.get((share.node, share.device))
        if capacity is not None:
            taken[capacity] = taken.get(capacity, 0) + share.total
    return taken


def _shortfalls(taken: Mapping[DeviceCapacity, int]) -> Iterator[DeviceShortfall]:
    """Yield where more is taken than there is room for: on one device, or on all that share a memory."""
    by_memory: dict[tuple[str, str], list[DeviceCapacity]] = {}
    for capacity, size in taken.items():
        by_memory.setdefault(capacity.memory, []).append(capacity)
        if size > capacity.room:
            yield DeviceShortfall(capacity.node, capacity.device, size, capacity.room)
    for members in by_memory.values():
        size, room = sum(taken[capacity] for capacity in members), max(capacity.room for capacity in members)
        if len(members) > 1 and size > room and all(taken[capacity] <= capacity.room for capacity in members):
            yield DeviceShortfall(members[-1].node, members[-1].device, size, room)


def _is_gpu_of(head: Machine, capacity: DeviceCapacity) -> bool:
    """Return whether the device is a GPU of the head: the projector can be offloaded only to one."""
    return capacity.node == head.node and capacity.kind is Kind.GPU


def _checkpoint_seconds(
    head: Machine, footprint: Footprint, holds: Sequence[Hold], links: Mapping[str, Link]
) -> float:
    """Return the seconds to send a checkpoint of all remote layers to the head, device after device."""
    return sum(
        sum(footprint.snapshots[first:last]) / links.get(capacity.node, Link()).bandwidth
        for capacity, first, last in holds
        if capacity.node != head.node
    )
