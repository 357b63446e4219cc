"""Measures free memory of this node's devices, and what each deployment has allocated."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from sollold.agent.memory_room import MeasuredMemory
from sollold.engines.external.workers import ExternalWorkers
from sollold.engines.llamacpp.process import Process
from sollold.machine.device import PROCESSOR, Kind
from sollold.machine.devices import DeviceMeter, Measurement
from sollold.retry import LogAndRetry

log = logging.getLogger("sollold.agent")

MEASURE_SECONDS = 5.0
_FRESH_SECONDS = 0.3
"""Maximum age of a measurement on which memory is granted, in seconds."""
_MEASURE_TIMEOUT = 4.0
"""Timeout of a measurement, which may hang in a driver, for example: nothing is granted then."""
NO_MEASURE = f"the devices of this node can't be measured: no answer within {_MEASURE_TIMEOUT:.0f} s"


class MemoryMonitor:
    """Measures this node's memory and reports each measurement to the ledger.

    Attributes:
        others: returns device → bytes that an Ollama on this machine has loaded.
    """

    def __init__(
        self,
        meter: DeviceMeter,
        external: ExternalWorkers,
        processes: Callable[[], Sequence[tuple[str, list[Process], Mapping[str, int]]]],
        measured: Callable[[MeasuredMemory], None],
    ) -> None:
        """``processes``: returns those of each deployment, and what it holds once it is loaded, by device;
        ``measured``: called with each measurement."""
        self._meter = meter
        self._external = external
        self._processes = processes
        self._report = measured
        self._measured_at = float("-inf")
        self._measured = Measurement((), {})
        self._allocated: dict[str, dict[str, int]] = {}
        self._outdated = False
        """Whether memory was freed since the last measurement began."""
        self._warned = False
        self._measuring: asyncio.Task[None] | None = None
        self.others: Callable[[], Mapping[str, int]] = dict

    async def run(self) -> None:
        """Measure periodically until cancelled."""
        retrying = LogAndRetry("the measurement of memory", log)
        while True:
            await asyncio.sleep(max(1.0, self._measured_at + MEASURE_SECONDS - time.monotonic()))
            if time.monotonic() - self._measured_at >= MEASURE_SECONDS - 0.1:
                with retrying:
                    await self.measure()

    async def refresh(self) -> bool:
        """Report a measurement recent enough to grant on; return False if none can be had, see `measure`."""
        if time.monotonic() - self._measured_at <= _FRESH_SECONDS:
            self.report()
            return True
        # One that was running may be outdated already.
        return await self.measure() and (not self._outdated or await self.measure())

    def invalidate(self) -> None:
        """Discard the last measurement, and one that is running: memory was freed, or a model is loaded now.
        A grant measures again."""
        self._meter.memory_changed()
        self._measured_at = float("-inf")
        self._outdated = True

    async def wait_until_measured(self) -> None:
        """Wait up to `_MEASURE_TIMEOUT` for a running measurement."""
        if self._measuring is not None:
            await asyncio.wait([self._measuring], timeout=_MEASURE_TIMEOUT)

    async def measure(self) -> bool:
        """Measure the devices now, or join a running measurement.

        Returns False if it is not done within `_MEASURE_TIMEOUT`; it then continues in the background.
        """
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(self._measure())
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT):
                await asyncio.shield(self._measuring)
        except TimeoutError:
            if not self._warned:
                self._warned = True
                log.warning("%s", NO_MEASURE)
            return False
        self._warned = False
        return True

    async def _measure(self) -> None:
        processes = self._processes()
        self._outdated = False
        self._measured, self._allocated = await asyncio.to_thread(self._measure_blocking, processes)
        if not self._outdated:
            self._measured_at = time.monotonic()
        self.report()

    def report(self) -> None:
        """Report the devices as last measured."""
        devices = (*self._measured.devices, *self._external.devices())
        # The system counts mapped weights as free, but would have to evict them while they are in use.
        taken = {PROCESSOR: min(self.others().get(PROCESSOR, 0), self._measured.mapped)}
        self._report(MeasuredMemory(devices, self._allocated, self._meter.reserves(), taken))

    def _measure_blocking(
        self, processes: Sequence[tuple[str, list[Process], Mapping[str, int]]]
    ) -> tuple[Measurement, dict[str, dict[str, int]]]:
        """Measure the devices, and what each deployment has allocated. Blocks."""
        measurement = self._meter.measure()
        gpus = {device.id for device in measurement.devices if device.kind is Kind.GPU and not device.pool}
        allocated: dict[str, dict[str, int]] = {}
        for deployment, running, loaded in processes:
            sizes = allocated.setdefault(deployment, {})
            for process in running:
                sizes[PROCESSOR] = sizes.get(PROCESSOR, 0) + process.memory()
                for pid in process.known_pids():
                    for device, size in measurement.processes.get(pid, {}).items():
                        sizes[device] = sizes.get(device, 0) + size
            # Many drivers do not tell what each process holds, and in a container they use other process ids.
            for device in loaded.keys() & gpus:
                sizes.setdefault(device, loaded[device])
        return measurement, allocated
