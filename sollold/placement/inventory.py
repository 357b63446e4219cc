"""What there is to place on: machines, their devices and the links between them, as the planner sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sollold.cluster.gossip.record import DIGEST_LENGTH, Backend, Endpoint, Record
from sollold.facts import dataclass
from sollold.machine.device import Device, Kind, one_a_memory
from sollold.machine.external_worker import external_address


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """One device that may hold layers.

    Attributes:
        device: llama.cpp's name on its machine.
        room: bytes that a plan may take, spare room already left out.
        overhead: bytes that one more process on it costs.
        bandwidth: bytes per second that weights are read with; 0.0 when unknown.
        compute: operations per second in a matrix product; 0.0 when unknown.
        held_back: bytes more that are free, and that the node's own limits keep from models.
        reserved: bytes more that are free, and left to the rest of the machine by the settings.
        others: bytes more that models could have if no other program used the device.
        pool: devices of a machine with one pool share one memory, so that ``room`` of each is that of
            all; empty: its memory is its own.
    """

    node: str
    device: str
    kind: Kind
    room: int
    overhead: int = 0
    bandwidth: float = 0.0
    compute: float = 0.0
    pool: str = ""
    held_back: int = 0
    reserved: int = 0
    others: int = 0

    @property
    def memory(self) -> tuple[str, str]:
        """What the device's bytes are taken from."""
        return self.node, self.pool or self.device

    @property
    def machine(self) -> str:
        """What computes: the node, or a worker that others started and the node names."""
        return external_address(self.device) or self.node


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two machines: round trip in seconds, bytes per second."""

    round_trip: float = 0.0005
    bandwidth: float = 110e6
    """Of a 1 Gb/s network, where nothing was measured."""


def joined(one: Link | None, other: Link) -> Link:
    """A way that leads over two links."""
    if one is None:
        return other
    return Link(one.round_trip + other.round_trip, min(one.bandwidth, other.bandwidth))


@dataclass(frozen=True, slots=True)
class Machine:
    """A node and what it offers.

    Attributes:
        name: host name, for people.
        holds: it has the model's file and can read it: it can be the head.
        cached: bytes of the model that its workers find on its own disk: tensors that were kept, or the file.
        links: measured from here (peer, link).
    """

    node: str
    name: str
    devices: tuple[DeviceCapacity, ...]
    holds: bool = False
    links: tuple[tuple[str, Link], ...] = ()
    cached: int = 0

    def device_named(self, device: str) -> DeviceCapacity | None:
        """The device of that name."""
        return next((capacity for capacity in self.devices if capacity.device == device), None)

    @property
    def room(self) -> int:
        """Bytes over all devices, a shared memory counted once."""
        return self.sum_of(lambda capacity: capacity.room)

    def sum_of(self, size: Callable[[DeviceCapacity], int]) -> int:
        """Some bytes of all devices, of those that share a memory the most."""
        memories: dict[tuple[str, str], int] = {}
        for capacity in self.devices:
            memories[capacity.memory] = max(memories.get(capacity.memory, 0), size(capacity))
        return sum(memories.values())

    @property
    def cpu(self) -> DeviceCapacity | None:
        """The processor."""
        return next((capacity for capacity in self.devices if capacity.kind is Kind.CPU), None)

    @property
    def gpus(self) -> tuple[DeviceCapacity, ...]:
        """Those of its devices that are GPUs."""
        return tuple(capacity for capacity in self.devices if capacity.kind is Kind.GPU)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A machine that takes no part, and why: half a sentence for a person."""

    node: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """All machines that may take part, and those left out."""

    machines: tuple[Machine, ...]
    left_out: tuple[LeftOut, ...] = ()

    def machine(self, node: str) -> Machine | None:
        """The machine of that id."""
        return next((machine for machine in self.machines if machine.node == node), None)

    def name(self, node: str) -> str:
        """The host name of a node, for people."""
        known: tuple[Machine | LeftOut, ...] = (*self.machines, *self.left_out)
        return next((one.name for one in known if one.node == node), node)


def links_between(machines: Iterable[Machine], head: Machine) -> dict[str, Link]:
    """Link from ``head`` to each other machine: what either side measured, the mean where both did."""
    own = dict(head.links)
    found: dict[str, Link] = {}
    for machine in machines:
        there = own.get(machine.node)
        back = next((link for peer, link in machine.links if peer == head.node), None)
        if there is not None and back is not None:
            found[machine.node] = Link(
                (there.round_trip + back.round_trip) / 2, (there.bandwidth + back.bandwidth) / 2
            )
        else:
            found[machine.node] = there or back or Link()
    return found


def machine_of(
    record: Record,
    *,
    holds: bool,
    spare: float,
    freed: Mapping[str, int] | None = None,
    taken: Mapping[str, int] | None = None,
    one_pool: bool = False,
    digest: str = "",
    copy: int = 0,
) -> Machine:
    """A record as the planner sees it.

    Args:
        record: what the node says of itself.
        holds: it has the model's file.
        spare: share of each device's memory that stays unused.
        freed: device → bytes that an eviction would give back.
        taken: device → bytes promised since the record was written.
        one_pool: all its devices share one limit.
        digest: of the model; empty: none in particular.
        copy: bytes of the model's file on its disk.
    """
    # What is taken from or given back to a shared memory is so for each device that shares it.
    change: dict[str, int] = {}
    pools = {
        device.id: "node" if one_pool and device.kind is not Kind.EXTERNAL else device.memory
        for device in record.devices
    }
    for device, size in (freed or {}).items():
        change[pools.get(device, device)] = change.get(pools.get(device, device), 0) + size
    for device, size in (taken or {}).items():
        change[pools.get(device, device)] = change.get(pools.get(device, device), 0) - size
    offered = _offered(record.devices, one_pool)
    capacities = tuple(
        DeviceCapacity(
            node=record.node,
            device=device.id,
            kind=device.kind,
            room=_room(device, offered[device.id], spare, change.get(pools[device.id], 0))
            if device.kind is not Kind.EXTERNAL
            else _plain_room(device, record.devices, spare, freed or {}, taken or {}),
            overhead=device.overhead,
            bandwidth=device.bandwidth,
            compute=device.compute,
            pool="node" if one_pool and device.kind is not Kind.EXTERNAL else device.pool,
            held_back=_held_back(device),
            reserved=_reserved(device),
            others=_others(device),
        )
        for device in record.devices
    )
    links = tuple(
        (peer, Link(max(trip, 0.0), bandwidth if bandwidth > 0 else Link().bandwidth))
        for peer, trip, bandwidth in record.links
    )
    cached = dict(record.cached).get(digest[:DIGEST_LENGTH], 0) if digest else 0
    return Machine(record.node, record.name, capacities, holds=holds, links=links, cached=max(cached, copy))


def _offered(devices: tuple[Device, ...], one_pool: bool) -> dict[str, int]:
    """Bytes that each device could get: each that shares a memory says what all of it has left."""
    offered = {device.id: device.available for device in devices}
    # Under one limit over the node each device says what the limit leaves.
    if one_pool:
        own = [device.id for device in devices if device.kind is not Kind.EXTERNAL]
        offered |= dict.fromkeys(own, max((offered[id] for id in own), default=0))
    return offered


def _plain_room(
    device: Device,
    devices: tuple[Device, ...],
    spare: float,
    freed: Mapping[str, int],
    taken: Mapping[str, int],
) -> int:
    """A worker that others started is one deployment's at a time: it is there whole or not at all."""
    address = external_address(device.id)
    alike = [other for other in devices if external_address(other.id) == address]
    if any(taken.get(other.id, 0) for other in alike):
        return 0
    given = any(other.granted for other in alike) and all(
        freed.get(other.id, 0) >= other.granted for other in alike
    )
    room = min(device.free, device.limit) if given else device.available
    return max(room - int(min(device.total, device.limit) * spare), 0)


def _held_back(device: Device) -> int:
    """Free bytes that ``node.memory_limit`` or ``node.device_limits`` keep from models."""
    if device.limit >= device.total:
        return 0
    return max(0, min(device.free - device.reserve, device.total - device.granted) - device.available)


def _reserved(device: Device) -> int:
    """Free bytes that ``node.reserve`` or ``node.gpu_reserve`` keep from models."""
    more = min(device.free, device.limit - device.granted) - device.available
    return min(device.reserve, max(0, more))


def _others(device: Device) -> int:
    """Bytes that models could have beside what they can have now, were it not for other programs."""
    if device.kind is Kind.EXTERNAL:
        return 0
    used = device.total - device.free - device.granted
    room = min(device.total - device.reserve, device.limit) - device.granted
    return max(0, min(used, room - device.available))


def _room(device: Device, offered: int, spare: float, more: int) -> int:
    # A limit over the whole node shows in what is available alone, so the spare room is a share of what the
    # device can give at all, not of its size.
    whole = min(device.limit, device.total, offered + device.granted)
    return max(min(offered + more, device.limit, device.total) - int(whole * spare), 0)


def _freed(endpoint: Endpoint) -> int:
    return sum(placed.freed for placed in endpoint.placed) if endpoint.placed else endpoint.bytes


UNKNOWN = 1 << 62
"""Bytes where nothing is measured yet: nothing speaks against it."""


def ollama_room(record: Record) -> int:
    """Bytes over all memories of the node, as its record has it; deployments keep what they were granted."""
    own = [device for device in record.devices if device.kind is not Kind.EXTERNAL]
    if not own:
        return UNKNOWN
    free = sum(device.free for device in one_a_memory(own, lambda device: device.free))
    total = sum(device.total for device in one_a_memory(own, lambda device: device.total))
    granted = sum(device.granted for device in own)
    loaded = [one for one in record.endpoints if one.backend is Backend.OLLAMA and one.loaded]
    busy = sum(one.bytes for one in loaded if one.active or one.waiting)
    # What ending the idle ones frees is what their runners really hold.
    idle = sum(_freed(one) for one in loaded if not (one.active or one.waiting))
    # Mapped weights count as free to the system, so what is free alone would count a busy model's too.
    return max(0, min(free + idle, total - granted - busy))
