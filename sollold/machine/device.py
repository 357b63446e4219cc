"""The devices of a machine that can hold layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from sollold.facts import dataclass

PROCESSOR = "CPU"
"""llama.cpp's device name of the CPU."""


class Kind(StrEnum):
    """Type of a device: a GPU, the CPU, or any device of an external worker."""

    GPU = "gpu"
    CPU = "cpu"
    EXTERNAL = "plain"
    """On the network, without authentication or encryption; see `sollold.machine.external_worker`."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that can hold layers of a model. Sizes in bytes.

    Attributes:
        id: llama.cpp's name for it on its own machine (``CUDA0``, ``Vulkan1``, ``CPU``); for a device of an
            external worker, the worker's address.
        total: physical size; for ``CPU`` the RAM, bounded by the cgroup.
        free: free memory when last measured, counting all users. A hint: it is outdated when read.
        limit: maximum for all grants together, from the settings (``total`` if not set).
        granted: memory currently granted.
        available: what another grant could get now; computed by the ledger.
        overhead: cost of one more process that uses the device (such as a CUDA context).
        bandwidth: memory bandwidth for reading, in bytes per second; 0.0 if unknown.
        compute: operations per second in a matrix product (two per multiply-add); 0.0 if unknown.
        pool: devices of a node with the same pool share one memory (an integrated GPU and the RAM, both
            ``ram``): what one uses the other lacks. Empty: the device's memory is its own.
        reserve: memory that the settings leave to the rest of the machine.
        barred: further free memory that the daemon's control group keeps from it.
    """

    id: str
    kind: Kind
    name: str
    total: int
    free: int
    limit: int
    granted: int
    available: int
    overhead: int = 0
    bandwidth: float = 0.0
    compute: float = 0.0
    pool: str = ""
    reserve: int = 0
    barred: int = 0

    @property
    def memory(self) -> str:
        """Name of the device's memory, unique on its node: devices that share memory have the same name."""
        return self.pool or self.id


def one_a_memory(devices: Iterable[Device], size: Callable[[Device], int]) -> list[Device]:
    """Return one device per memory: of those that share one, and each report all of it, the largest."""
    kept: dict[str, Device] = {}
    for device in devices:
        if device.memory not in kept or size(device) > size(kept[device.memory]):
            kept[device.memory] = device
    return list(kept.values())
