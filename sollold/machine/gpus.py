"""NVIDIA GPUs through NVML, which is cheap enough to query every few seconds and sees every process."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from sollold.facts import dataclass

log = logging.getLogger("sollold.machine")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. Sizes in bytes, bandwidth in bytes per second, compute in operations per second.

    Attributes:
        index: position in PCI bus order, which is CUDA's order with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
        bandwidth: memory clock × 2 (double data rate) × bus width.
        compute: cores × clock × 2, in single precision without tensor cores: a lower bound.
        processes: pid → bytes used, as far as the driver reports it.
        total: 0 if the driver does not report it; then only the position is known.
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
        """Whether the driver reported its figures."""
        return self.total > 0


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """Load of a GPU; NaN for values that the driver does not report.

    Attributes:
        device: llama.cpp's name for it, ``CUDA0`` and so on.
        utilization: fraction of the last sampling period in which it computed, 0.0 to 1.0.
        temperature: in degrees Celsius; ``power``: in watts.
    """

    device: str
    utilization: float
    temperature: float
    power: float


class Nvml:
    """The NVIDIA driver's management library. Without one there are no GPUs, which is not an error."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self.problem = ""
        """Why NVIDIA GPUs can't be detected; empty if they can, or if there is no driver."""
        self._warned: dict[int, str] = {}
        try:
            # The binding is 2 MB of constants, useless without the library that it would load.
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
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
                self.problem = f"NVML could not be initialized: {error}"
            return
        self._nvml = pynvml

    def close(self) -> None:
        """Release the driver."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def gpus(self) -> list[Gpu]:
        """Return the GPUs that this process may use, with current figures."""
        if self._nvml is None:
            return []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            self._warn_once(-1, f"NVML can't count the GPUs: {error}")
            return []
        self._warn_once(-1, "")
        return visible([self._gpu(index) for index in range(count)], os.environ.get("CUDA_VISIBLE_DEVICES"))

    @property
    def present(self) -> bool:
        """Whether there is a driver."""
        return self._nvml is not None

    def loads(self, gpus: Sequence[Gpu]) -> list[GpuLoad]:
        """Return the current load of ``gpus``, a result of `gpus`. Blocks briefly."""
        nvml = self._nvml
        if nvml is None:
            return []
        found = []
        for place, gpu in enumerate(gpus):
            if not gpu.readable:
                continue
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            except nvml.NVMLError:
                continue
            found.append(
                GpuLoad(
                    f"CUDA{place}",
                    self._measured(lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100, handle),
                    self._measured(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                    self._measured(lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000, handle),
                )
            )
        return found

    def _measured(self, query: Any, *arguments: Any) -> float:
        try:
            return float(query(*arguments))
        except (self._nvml.NVMLError, AttributeError):
            return math.nan

    def _gpu(self, index: int) -> Gpu:
        """Query a GPU. An unreadable one keeps its position, on which the names of the others depend."""
        nvml = self._nvml
        name, uuid = f"GPU {index}", ""
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            self._warn_once(index, f"GPU {index} can't be read: {error}")
            return Gpu(index, uuid, name, 0, 0, 0.0, 0.0, {})
        self._warn_once(index, "")
        memory_clock = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM) * 1e6
        bus = self._number(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        cores = self._number(nvml.nvmlDeviceGetNumGpuCores, handle)
        core_clock = self._number(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) * 1e6
        return Gpu(
            index,
            uuid,
            name,
            int(memory.total),
            int(memory.free),
            bandwidth=memory_clock * 2 * bus / 8,
            compute=cores * core_clock * 2,
            processes=self._processes(handle),
        )

    def _warn_once(self, index: int, problem: str) -> None:
        """Log a problem once: the GPUs are queried every few seconds."""
        if problem and problem != self._warned.get(index):
            log.warning("%s", problem)
        self._warned[index] = problem

    def _number(self, query: Any, *arguments: Any) -> float:
        try:
            return float(query(*arguments))
        except (self._nvml.NVMLError, AttributeError):
            return 0.0

    def _processes(self, handle: Any) -> dict[int, int]:
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return {}
        return {process.pid: int(process.usedGpuMemory) for process in running if process.usedGpuMemory}


def visible(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Return the GPUs selected by ``CUDA_VISIBLE_DEVICES``, in its order; by index or UUID prefix.

    As in CUDA, entries after the first invalid one are ignored.
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
