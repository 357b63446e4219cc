"""Computes how many bytes another grant could get on this node's devices. Pure.

That is the smallest of

- a device's limit minus the grants on it,
- the node's limit minus the grants on all devices,
- what is measured free, minus the reserve, minus granted memory that is not allocated yet, and minus
  what other programs use although it counts as free.

Devices in one pool share the last of these, and their grants together must fit into the pool's total.

The devices of an external worker (`sollold.machine.external_worker`) are not this machine's memory, so the
node's limit does not include them, and they serve one deployment at a time, since a worker has one client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

from sollold.facts import dataclass
from sollold.machine.device import Device
from sollold.machine.external_worker import external_address
from sollold.settings.schema import MIB


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """The last measurement of the devices.

    Attributes:
        devices: with their free and total memory.
        allocated: deployment → device → bytes that its processes held when ``free`` was measured; the
            rest of a grant counts as not allocated yet.
        reserves: device → bytes left to the rest of the machine.
        taken: device → bytes used by others than deployments although ``free`` includes them: weights that an
            Ollama has mapped.
    """

    devices: tuple[Device, ...] = ()
    allocated: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reserves: Mapping[str, int] = field(default_factory=dict)
    taken: Mapping[str, int] = field(default_factory=dict)

    def device(self, name: str) -> Device | None:
        """Return the device with this id, or None."""
        return next((device for device in self.devices if device.id == name), None)

    def without(self, deployment: str) -> MeasuredMemory:
        """Return it as it is once the processes of ``deployment`` are dead: what they held is free."""
        freed: dict[str, int] = {}
        for name, size in self.allocated.get(deployment, {}).items():
            if (found := self.device(name)) is not None:
                freed[found.memory] = freed.get(found.memory, 0) + size
        devices = tuple(
            replace(device, free=min(device.total, device.free + freed[device.memory]))
            if device.memory in freed
            else device
            for device in self.devices
        )
        others = {name: sizes for name, sizes in self.allocated.items() if name != deployment}
        return replace(self, devices=devices, allocated=others)


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """The memory left beside the current grants.

    Attributes:
        granted: deployment → device → bytes.
        node_limit: maximum bytes over all devices; 0: unlimited.
    """

    measured: MeasuredMemory
    granted: Mapping[str, Mapping[str, int]]
    node_limit: int

    def granted_on(self, device: str) -> int:
        """Return the bytes that all deployments together have on a device."""
        return sum(sizes.get(device, 0) for sizes in self.granted.values())

    def available(self, device: str) -> int:
        """Return the bytes that another grant could get on ``device`` now; 0 if it is unknown."""
        found = self.measured.device(device)
        if found is None or self._taken_by(device):
            return 0
        room = min(self._device_room(found), self._pool_room(found))
        return max(0, room if external_address(device) else min(room, self._node_room()))

    def missing(self, wanted: Mapping[str, int]) -> str:
        """Return why ``wanted`` is not available, or an empty string."""
        for name, size in wanted.items():
            device = self.measured.device(name)
            if device is None:
                return f"there is no device {name} here"
            if user := self._taken_by(name):
                return f"{name} serves one deployment at a time, and {user} has it"
            if size > (room := max(0, self._device_room(device))):
                return (
                    f"{name}: {_mib(size)} requested, {_mib(room)} left under its limit of "
                    f"{_mib(device.limit)}"
                )
            total = sum(wanted.get(member.id, 0) for member in self._members(device))
            if total > (room := max(0, self._pool_room(device))):
                return f"{name}: {_mib(total)} requested, {_mib(room)} free"
        if self.node_limit and _own(wanted) > (room := max(0, self._node_room())):
            return (
                f"{_mib(_own(wanted))} requested, {_mib(room)} left under the node's limit of "
                f"{_mib(self.node_limit)}"
            )
        return ""

    def _members(self, device: Device) -> list[Device]:
        if not device.pool:
            return [device]
        return [member for member in self.measured.devices if member.pool == device.pool]

    def _device_room(self, device: Device) -> int:
        return device.limit - self.granted_on(device.id)

    def _pool_room(self, device: Device) -> int:
        """Return what is left of the memory itself; the members of a pool are measured as one."""
        members = self._members(device)
        reserve = max(self.measured.reserves.get(member.id, 0) for member in members)
        pledged = 0
        for deployment, bytes_ in self.granted.items():
            allocated = self.measured.allocated.get(deployment, {})
            sizes = [(bytes_.get(member.id, 0), allocated.get(member.id, 0)) for member in members]
            pledged += max(0, sum(granted for granted, _ in sizes) - sum(used for _, used in sizes))
        total = max(member.total for member in members) - sum(
            self.granted_on(member.id) for member in members
        )
        mapped = sum(self.measured.taken.get(member.id, 0) for member in members)
        return min(total, max(member.free for member in members) - reserve - pledged) - mapped

    def _node_room(self) -> int:
        if not self.node_limit:
            return max((device.total for device in self.measured.devices), default=0)
        return self.node_limit - sum(map(_own, self.granted.values()))

    def _taken_by(self, device: str) -> str:
        """Return the deployment that uses the external worker behind ``device``; empty if none."""
        if not (address := external_address(device)):
            return ""
        users = (
            deployment
            for deployment, sizes in self.granted.items()
            if any(external_address(name) == address for name in sizes)
        )
        return next(users, "")


def _own(sizes: Mapping[str, int]) -> int:
    """Return the bytes on the machine's own devices."""
    return sum(size for device, size in sizes.items() if not external_address(device))


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
