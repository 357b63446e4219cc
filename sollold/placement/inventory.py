"""The machines, devices and links that the planner can place a model on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from sollold.cluster.gossip.record import DIGEST_LENGTH, Backend, Endpoint, Record
from sollold.facts import dataclass
from sollold.machine.device import Device, Kind, one_a_memory
from sollold.machine.external_worker import external_address


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """One device that may hold layers.

    Attributes:
        device: llama.cpp's name of the device on its machine.
        room: bytes that a plan may take, spare room already deducted.
        overhead: bytes that one more process on the device costs.
        bandwidth: bytes of weights read per second; 0.0 when unknown.
        compute: operations per second in a matrix product; 0.0 when unknown.
        held_back: further free bytes that the node's own limits keep from models.
        barred: further free bytes that the control group of the node's daemon keeps from it.
        reserved: further free bytes that the settings leave to the rest of the machine.
        others: further bytes that models could have if no other program used the device.
        pool: devices of a machine with the same pool share one memory, so the ``room`` of each is that of
            all; empty: the device has its own memory.
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
    barred: int = 0
    reserved: int = 0
    others: int = 0

    @property
    def memory(self) -> tuple[str, str]:
        """The memory that the device's bytes are taken from."""
        return self.node, self.pool or self.device

    @property
    def machine(self) -> str:
        """The machine that computes: the node, or an external worker that the node lists."""
        address = external_address(self.device)
        return worker_key(self.node, address) if address else self.node


@dataclass(frozen=True, slots=True)
class Link:
    """The network link between two machines: round trip in seconds, bandwidth in bytes per second."""

    round_trip: float = 0.0005
    bandwidth: float = 110e6
    """Default: that of a 1 Gb/s network."""


def joined(first: Link | None, second: Link) -> Link:
    """Return the link that two links in a row make."""
    if first is None:
        return second
    return Link(first.round_trip + second.round_trip, min(first.bandwidth, second.bandwidth))


@dataclass(frozen=True, slots=True)
class Machine:
    """A node and what it offers.

    Attributes:
        name: host name, for display.
        holds: whether it has the model's file and can read it, so that it can be the head.
        cached: bytes of the model that its workers find on its own disk: cached tensors, or the file.
        links: (peer, link) pairs measured by this node.
    """

    node: str
    name: str
    devices: tuple[DeviceCapacity, ...]
    holds: bool = False
    links: tuple[tuple[str, Link], ...] = ()
    cached: int = 0

    def device_named(self, device: str) -> DeviceCapacity | None:
        """Return the device of that name, if any."""
        return next((capacity for capacity in self.devices if capacity.device == device), None)

    @property
    def room(self) -> int:
        """Room in bytes over all devices, counting a shared memory once."""
        return self.sum_of(lambda capacity: capacity.room)

    def sum_of(self, size: Callable[[DeviceCapacity], int]) -> int:
        """Sum ``size`` over all devices, counting only the largest of those that share a memory."""
        memories: dict[tuple[str, str], int] = {}
        for capacity in self.devices:
            memories[capacity.memory] = max(memories.get(capacity.memory, 0), size(capacity))
        return sum(memories.values())

    @property
    def cpu(self) -> DeviceCapacity | None:
        """The processor, if offered."""
        return next((capacity for capacity in self.devices if capacity.kind is Kind.CPU), None)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A machine that takes no part; ``reason``: a clause for display."""

    node: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """All machines that may take part, and those left out."""

    machines: tuple[Machine, ...]
    left_out: tuple[LeftOut, ...] = ()

    def machine(self, node: str) -> Machine | None:
        """Return the machine of that node id, if any."""
        return next((machine for machine in self.machines if machine.node == node), None)

    def device(self, node: str, device: str) -> DeviceCapacity | None:
        """Return a device of one of the machines, if it is there."""
        machine = self.machine(node)
        return machine.device_named(device) if machine is not None else None

    def name(self, node: str) -> str:
        """Return a node's host name, for display; the node id when unknown."""
        entries: tuple[Machine | LeftOut, ...] = (*self.machines, *self.left_out)
        return next((entry.name for entry in entries if entry.node == node), node)


def links_between(machines: Iterable[Machine], head: Machine) -> dict[str, Link]:
    """Return the link from ``head`` to each machine as either side measured it; the mean where both did."""
    own = dict(head.links)
    found: dict[str, Link] = {}
    for machine in machines:
        forward = own.get(machine.node)
        backward = next((link for peer, link in machine.links if peer == head.node), None)
        if forward is not None and backward is not None:
            found[machine.node] = Link(
                (forward.round_trip + backward.round_trip) / 2, (forward.bandwidth + backward.bandwidth) / 2
            )
        else:
            found[machine.node] = forward or backward or Link()
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
    """Convert a node's record into the planner's view of it.

    Args:
        record: the node's own record.
        holds: whether the node has the model's file.
        spare: share of each device's memory to leave unused.
        freed: bytes that an eviction would free, by device.
        taken: bytes promised since the record was written, by device.
        one_pool: whether all devices share one limit.
        digest: digest of the model; empty: no particular model.
        copy: bytes of the model's file on the node's disk.
    """
    # A change to a shared memory applies to each device that shares it.
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
            barred=device.barred,
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


def worker_key(node: str, address: str) -> str:
    """Identify an external worker that ``node`` names: only a loopback address is each node's own."""
    return f"{node} {address}" if address.startswith(("localhost:", "127.")) else address


def each_worker_once(machines: Sequence[Machine], users: Mapping[str, str]) -> tuple[Machine, ...]:
    """Leave each external worker on one machine: several nodes may name the same, and it serves one client.

    ``users``: `worker_key` → node for which it serves a deployment now.
    """
    owners = dict(users)
    for machine in sorted(machines, key=lambda machine: (not machine.holds, machine.node)):
        for capacity in machine.devices:
            if address := external_address(capacity.device):
                owners.setdefault(worker_key(machine.node, address), machine.node)

    def owned(capacity: DeviceCapacity) -> bool:
        address = external_address(capacity.device)
        return not address or owners[worker_key(capacity.node, address)] == capacity.node

    return tuple(replace(machine, devices=tuple(filter(owned, machine.devices))) for machine in machines)


def _offered(devices: tuple[Device, ...], one_pool: bool) -> dict[str, int]:
    """Return the available bytes by device; with a shared memory or limit, each reports those of all."""
    offered = {device.id: device.available for device in devices}
    # With one limit for the node, each device reports what the limit leaves.
    if one_pool:
        own_ids = [device.id for device in devices if device.kind is not Kind.EXTERNAL]
        offered |= dict.fromkeys(own_ids, max((offered[id] for id in own_ids), default=0))
    return offered


def _plain_room(
    device: Device,
    devices: tuple[Device, ...],
    spare: float,
    freed: Mapping[str, int],
    taken: Mapping[str, int],
) -> int:
    """Return an external worker's room: it serves one deployment at a time, so all of it or nothing."""
    address = external_address(device.id)
    siblings = [sibling for sibling in devices if external_address(sibling.id) == address]
    if any(taken.get(sibling.id, 0) for sibling in siblings):
        return 0
    released = any(sibling.granted for sibling in siblings) and all(
        freed.get(sibling.id, 0) >= sibling.granted for sibling in siblings
    )
    room = min(device.free, device.limit) if released else device.available
    return max(room - int(min(device.total, device.limit) * spare), 0)


def _held_back(device: Device) -> int:
    """Return the free bytes that ``node.memory_limit`` or ``node.device_limits`` keep from models."""
    if device.limit >= device.total:
        return 0
    return max(0, min(device.free - device.reserve, device.total - device.granted) - device.available)


def _reserved(device: Device) -> int:
    """Return the free bytes that ``node.reserve`` or ``node.gpu_reserve`` keep from models."""
    extra = min(device.free, device.limit - device.granted) - device.available
    return min(device.reserve, max(0, extra))


def _others(device: Device) -> int:
    """Return the bytes that models could have in addition if other programs used none."""
    if device.kind is Kind.EXTERNAL:
        return 0
    used = device.total - device.free - device.granted
    room = min(device.total - device.reserve, device.limit) - device.granted
    return max(0, min(used, room - device.available))


def _room(device: Device, offered: int, spare: float, change: int) -> int:
    # A limit on the whole node shows only in the available bytes, so the spare room is a share of what the
    # device can give at most, not of its size.
    capacity = min(device.limit, device.total, offered + device.granted)
    return max(min(offered + change, device.limit, device.total) - int(capacity * spare), 0)


def _freed(endpoint: Endpoint) -> int:
    return sum(placed.freed for placed in endpoint.placed) if endpoint.placed else endpoint.bytes


UNKNOWN = 1 << 62
"""Room in bytes of a node that has measured nothing yet: assume that everything fits."""


def ollama_room(record: Record) -> int:
    """Return the bytes that Ollama could use on the node, by its record, leaving deployments their grants."""
    own = [device for device in record.devices if device.kind is not Kind.EXTERNAL]
    if not own:
        return UNKNOWN
    free = sum(device.free for device in one_a_memory(own, lambda device: device.free))
    total = sum(device.total for device in one_a_memory(own, lambda device: device.total))
    granted = sum(device.granted for device in own)
    loaded = [entry for entry in record.endpoints if entry.backend is Backend.OLLAMA and entry.loaded]
    busy = sum(entry.bytes for entry in loaded if entry.active or entry.waiting)
    # Unloading idle models frees what their runners really hold.
    idle = sum(_freed(entry) for entry in loaded if not (entry.active or entry.waiting))
    # The system counts mapped weights as free, so `free` alone would include those of busy models.
    return max(0, min(free + idle, total - granted - busy))
