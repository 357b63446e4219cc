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
        total: 0 when the driver does not tell its memory: then only its place in the order is known.
    """

    index: int
    uuid: str
    name: str
    total: int
    free: int
    bandwidth: float
    compute: float
    processes: dict[int, int]

    @property
    def readable(self) -> bool:
        """Whether the driver told its figures."""
        return self.total > 0


class Nvml:
    """The NVIDIA driver's management library. Without one there are no GPUs, and that is no error."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self.problem = ""
        """Why NVIDIA GPUs can't be seen; empty when they can, or when there is no driver."""
        self._said: dict[int, str] = {}
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
            self._say(-1, f"NVML does not count the GPUs: {error}")
            return []
        self._say(-1, "")
        return visible([self._gpu(index) for index in range(count)], os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _gpu(self, index: int) -> Gpu:
        """One that can't be read keeps its place: the others' names count on it."""
        nvml = self._nvml
        name, uuid = f"GPU {index}", ""
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            self._say(index, f"GPU {index} can't be read: {error}")
            return Gpu(index, uuid, name, 0, 0, 0.0, 0.0, {})
        self._say(index, "")
        clock = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM) * 1e6
        bus = self._number(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        cores = self._number(nvml.nvmlDeviceGetNumGpuCores, handle)
        cycle = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) * 1e6
        return Gpu(
            index,
            uuid,
            name,
            int(memory.total),
            int(memory.free),
            bandwidth=clock * 2 * bus / 8,
            compute=cores * cycle * 2,
            processes=self._processes(handle),
        )

    def _say(self, index: int, trouble: str) -> None:
        """Once: the GPUs are looked at every few seconds."""
        if trouble and trouble != self._said.get(index):
            log.warning("%s", trouble)
        self._said[index] = trouble

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
