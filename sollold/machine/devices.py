"""Measures this machine's devices; the memory figures of the record and the ledger come from here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from pathlib import Path

from sollold.facts import dataclass
from sollold.machine.backends import ListedDevice, built_for, listed
from sollold.machine.device import PROCESSOR, Device, Kind
from sollold.machine.gpus import Gpu, GpuLoad, Nvml
from sollold.machine.memory import Memory, memory
from sollold.machine.speed import Speed, processor_name, speed
from sollold.settings.schema import MIB, NodeSettings

log = logging.getLogger("sollold.machine")

UNIFIED = "ram"
"""Pool of the CPU and of every GPU without memory of its own."""
LIST_SECONDS = 60.0
"""Maximum age of the listing of GPUs that NVML does not measure, in seconds: listing starts a process."""
_OVERHEADS = {"CUDA": 512 * MIB, "ROCm": 512 * MIB, "Vulkan": 128 * MIB, "SYCL": 256 * MIB}
"""Cost of one more process before it allocates anything: its context. Conservative guesses."""
PROCESS = 24 * MIB
"""RAM of a llama.cpp process besides its buffers, in bytes. Measured with b11434 (VmRSS minus the buffers in
its log): a worker 5 MiB before it serves a client and 9 MiB afterwards; llama-server 18 MiB, of which 13 are
its program. The vocabulary is counted with the model."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The devices at one moment, and the GPU memory of processes then: pid → device → bytes.

    ``mapped``: bytes of RAM that count as free although processes have mapped files there.
    """

    devices: tuple[Device, ...]
    processes: dict[int, dict[str, int]]
    mapped: int = 0


class DeviceMeter:
    """Measures the devices. `measure` blocks, even forever if a driver hangs: call it off the loop, in any
    thread. The other methods use the last measurement and do not wait for one, except `gpu_loads`.

    Args:
        settings: limits, reserves and which devices may be used.
        state: folder of the file with the measured speed.
    """

    def __init__(self, settings: NodeSettings, state: Path) -> None:
        self._settings = settings
        self._state = state
        self._nvml = Nvml()
        self._measuring = threading.Lock()
        self._speed: Speed | None = None
        self._gpus: list[Gpu] = []
        self._lock = threading.Lock()
        """Guards what `use_server` and a listing both set; held only briefly."""
        self._server: Path | None = None
        self._listed: list[ListedDevice] = []
        self._listed_at = float("-inf")
        self._list_failed = False
        self._changed = False
        """Whether memory was taken or freed since the last listing."""
        self._warned_absent: Path | None = None

    @property
    def problem(self) -> str:
        """Why GPUs can't be detected, for display; empty if there is no problem."""
        return self._nvml.problem

    def idle_gpus(self) -> tuple[str, ...]:
        """Return the names of GPUs that the driver knows but the llama.cpp in use can't use."""
        offered = {device.id for device in self._listed}
        if self._listed_at == float("-inf") or any(not name.startswith("CUDA") for name in offered):
            return ()
        gpus = [(index, gpu) for index, gpu in enumerate(self._gpus) if gpu.readable]
        return tuple(gpu.name for index, gpu in gpus if f"CUDA{index}" not in offered)

    def absent_gpus(self) -> tuple[str, ...]:
        """Return the kinds of GPU that the llama.cpp in use was built for, if it found no GPU at all."""
        with self._lock:
            server, found = self._server, self._listed
            unknown = self._listed_at == float("-inf") or self._list_failed
        return () if server is None or unknown or found else built_for(server)

    @property
    def can_tell_load(self) -> bool:
        """Whether a driver reports the GPUs' load."""
        return self._nvml.present

    def gpu_loads(self) -> list[GpuLoad]:
        """Return the current load of the last measurement's GPUs. Blocks briefly: call it off the loop."""
        return self._nvml.loads(self._gpus)

    def reserves(self) -> dict[str, int]:
        """Return device → bytes left to the rest of the machine."""
        gpus = {device.id: 0 if device.unified else self._settings.gpu_reserve for device in self._listed}
        return {PROCESSOR: self._settings.reserve, **gpus}

    def close(self) -> None:
        """Release the drivers."""
        self._nvml.close()

    def use_server(self, server: Path) -> None:
        """Use the devices of this ``llama-server`` from now on."""
        with self._lock:
            self._server = server
            self._listed_at = float("-inf")

    def memory_changed(self) -> None:
        """List GPUs that NVML does not measure again in the next measurement."""
        with self._lock:
            self._changed = True

    def measure(self) -> Measurement:
        """Measure the devices. The first call takes up to 2 s, for the processor's speed."""
        with self._measuring:
            if self._speed is None:
                self._speed = speed(self._state / "speed.json")
            self._gpus = self._nvml.gpus()
            self._list(self._gpus)
            return combine(self._settings, memory(), self._speed, self._listed, self._gpus)

    def _list(self, gpus: Collection[Gpu]) -> None:
        with self._lock:
            server, known, listed_at = self._server, self._listed, self._listed_at
            changed, self._changed = self._changed, False
        if server is None:
            return
        # Figures of GPUs that NVML does not measure get outdated; and a driver may come up after the daemon.
        measured = {f"CUDA{index}" for index, gpu in enumerate(gpus) if gpu.readable}
        outdated = self._list_failed or (not known and measured) or any(d.id not in measured for d in known)
        if listed_at == float("-inf") or (
            outdated and (changed or time.monotonic() - listed_at > LIST_SECONDS)
        ):
            fresh = listed(server)
            with self._lock:
                if self._server == server:
                    # A failed listing says nothing about the GPUs: they may be in use.
                    self._list_failed = fresh is None
                    self._listed = known if fresh is None else fresh
                    self._listed_at = time.monotonic()
            self._warn_absent(server)

    def _warn_absent(self, server: Path) -> None:
        """Warn once per llama.cpp: GPUs are listed repeatedly."""
        if (kinds := self.absent_gpus()) and server != self._warned_absent:
            self._warned_absent = server
            log.warning(
                "llama.cpp is built for %s, but no GPU was found: models run on the processor "
                "(run `sollold doctor` for advice)",
                " and ".join(kinds),
            )


def combine(
    settings: NodeSettings,
    ram: Memory,
    processor: Speed,
    offered: Collection[ListedDevice],
    gpus: Collection[Gpu],
) -> Measurement:
    """Combine what llama.cpp offers with what NVML and the system measure.

    NVML's figures are newer than the listing's and take precedence. Unusable GPUs are omitted.
    """
    nvml = {f"CUDA{index}": gpu for index, gpu in enumerate(gpus) if gpu.readable}
    devices: list[Device] = []
    processes: dict[int, dict[str, int]] = {}
    for entry in offered:
        if settings.devices and entry.id not in settings.devices:
            continue
        gpu = nvml.get(entry.id)
        total, free = (gpu.total, gpu.free) if gpu and not entry.unified else (entry.total, entry.free)
        if entry.unified:
            total, free = min(total, ram.total), min(free, ram.free)
        if gpu:
            for pid, size in gpu.processes.items():
                processes.setdefault(pid, {})[entry.id] = size
        devices.append(
            Device(
                id=entry.id,
                kind=Kind.GPU,
                name=entry.name,
                total=total,
                free=free,
                limit=_limit(settings, entry.id, total),
                granted=0,
                available=0,
                overhead=_OVERHEADS.get(entry.id.rstrip("0123456789"), 0),
                bandwidth=gpu.bandwidth if gpu else processor.bandwidth if entry.unified else 0.0,
                compute=gpu.compute if gpu else 0.0,
                pool=UNIFIED if entry.unified else "",
            )
        )
    if not settings.devices or PROCESSOR in settings.devices:
        devices.append(
            Device(
                id=PROCESSOR,
                kind=Kind.CPU,
                name=processor.processor or processor_name(),
                total=ram.total,
                free=ram.free,
                limit=_limit(settings, PROCESSOR, ram.total),
                granted=0,
                available=0,
                overhead=PROCESS,
                bandwidth=processor.bandwidth,
                compute=processor.compute,
                pool=UNIFIED if any(device.pool for device in devices) else "",
                barred=ram.barred,
            )
        )
    return Measurement(tuple(devices), processes, ram.mapped)


def _limit(settings: NodeSettings, device: str, total: int) -> int:
    limits = [settings.device_limits.get(device, 0), settings.memory_limit]
    return min([total, *(limit for limit in limits if limit)])
