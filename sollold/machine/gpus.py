"""NVIDIA GPUs, by NVML: cheap enough to ask every few seconds, and it sees every process."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("sollold.machine")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Bytes; bytes per second; operations per second.

    Attributes:
        index: its place in the order of PCI buses, which is CUDA's with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
        bandwidth: memory clock × 2 (double data rate) × bus width.
        compute: cores × clock × 2, in single precision without tensor cores: a lower bound.
        processes: bytes that each process uses, as far as the driver tells.
    """

    index: int
    uuid: str
    name: str
    total: int
    free: int
    bandwidth: float
    compute: float
    processes: dict[int, int]


class Nvml:
    """The NVIDIA driver's management library. Without one there are no GPUs, and that is no error."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self.problem = ""
        """Why NVIDIA GPUs can't be seen; empty when they can, or when there is no driver."""
        try:
            import pynvml
        except ImportError as error:
            self.problem = f"the NVML binding can't be imported: {error}"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            quiet = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
            if error.value not in quiet:
                self.problem = f"NVML does not start: {error}"
            return
        self._nvml = pynvml

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use, as they are now."""
        if self._nvml is None:
            return []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            log.warning("NVML does not count the GPUs: %s", error)
            return []
        found = [gpu for index in range(count) if (gpu := self._gpu(index)) is not None]
        return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _gpu(self, index: int) -> Gpu | None:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        except nvml.NVMLError as error:
            log.warning("GPU %d can't be read: %s", index, error)
            return None
        clock = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM) * 1e6
        bus = self._number(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        cores = self._number(nvml.nvmlDeviceGetNumGpuCores, handle)
        cycle = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) * 1e6
        return Gpu(
            index,
            _text(uuid),
            _text(name),
            int(memory.total),
            int(memory.free),
            bandwidth=clock * 2 * bus / 8,
            compute=cores * cycle * 2,
            processes=self._processes(handle),
        )

    def _number(self, ask: Any, *arguments: Any) -> float:
        try:
            return float(ask(*arguments))
        except (self._nvml.NVMLError, AttributeError):
            return 0.0

    def _processes(self, handle: Any) -> dict[int, int]:
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return {}
        return {one.pid: int(one.usedGpuMemory) for one in running if one.usedGpuMemory}


def visible(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; numbers or the beginnings of UUIDs.

    As CUDA does, what follows the first unknown entry is not visible.
    """
    if variable is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in variable.split(",")):
        match = [
            gpu
            for gpu in gpus
            if entry and (entry == str(gpu.index) or (gpu.uuid.startswith(entry) and len(entry) > 3))
        ]
        if len(match) != 1:
            break
        chosen += match
    return chosen


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
