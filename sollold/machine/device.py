"""What a machine offers to hold layers: its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from sollold.facts import dataclass

PROCESSOR = "CPU"
"""llama.cpp's name of a machine's processor as a device."""


class Kind(StrEnum):
    """What computes: a GPU, the processor, or whatever is behind an external worker."""

    GPU = "gpu"
    CPU = "cpu"
    EXTERNAL = "plain"
    """Reached over the network, without proof and encryption; see `sollold.machine.external_worker`."""


@dataclass(frozen=True, slots=True)
class Device:
    """One place that can hold layers of a model. Sizes in bytes.

    Attributes:
        id: llama.cpp's name for it on its own machine (``CUDA0``, ``Vulkan1``, ``CPU``); of an
            external worker its address.
        total: physical size; for ``CPU`` the RAM, bounded by the cgroup.
        free: free when last measured, whoever uses the rest. A hint: it is stale when read.
        limit: most that grants may take in all, from the settings (``total`` when not set).
        granted: set aside by grants at present.
        available: what one more grant could get now; the ledger's own arithmetic.
        overhead: cost of one more process that uses the device (a CUDA context, say).
        bandwidth: bytes per second its memory can be read with; 0.0 when unknown.
        compute: multiply-adds per second in a matrix product, times two; 0.0 when unknown.
        pool: devices of a node with the same pool share one memory (an integrated GPU and the RAM, both
            ``ram``): what one gets the other has not. Empty: the device's memory is its own.
        reserve: left to the rest of the machine by the settings.
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

    @property
    def memory(self) -> str:
        """Names the memory among those of its node: devices that share one have the same."""
        return self.pool or self.id


def one_a_memory(devices: Iterable[Device], size: Callable[[Device], int]) -> list[Device]:
    """One device for each memory: of those that share one, which each say what all of it is, the largest."""
    kept: dict[str, Device] = {}
    for device in devices:
        if device.memory not in kept or size(device) > size(kept[device.memory]):
            kept[device.memory] = device
    return list(kept.values())
