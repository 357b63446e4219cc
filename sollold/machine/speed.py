"""Estimates how fast this machine's processor reads memory and multiplies, for predictions.

Bandwidth is measured: every core compares two buffers too large for the caches, which reads both. The rate of
multiply-adds is calculated from cores, clock and vector width, at the efficiency that llama.cpp's kernels
reach on quantized weights: nothing in Python's standard library could measure it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import mmap
import os
import platform
import threading
import time
from pathlib import Path

import psutil

from sollold.facts import dataclass
from sollold.machine.memory import memory
from sollold.settings.schema import MIB
from sollold.settings.state_file import read_json, save_json

log = logging.getLogger("sollold.machine")

_BUFFER = 48 * MIB
_MEASURE_SECONDS = 0.4
_BARRIER_SECONDS = 5.0
"""Timeout for all threads to allocate their buffers, in seconds."""
_EFFICIENCY = 0.35
_LANES = (("avx512f", 64), ("avx2", 32), ("sve", 32), ("asimd", 16), ("neon", 16), ("avx", 16), ("sse2", 8))
"""Single-precision operations per cycle of a core with this CPU flag: two units, multiply and add."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of a processor: ``bandwidth`` in bytes per second, ``compute`` in operations per second."""

    processor: str
    cores: int
    bandwidth: float
    compute: float


def cores() -> int:
    """Return the number of physical cores that this process may use, at least one."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return max(1, min(physical, len(os.sched_getaffinity(0))))
    return physical


def speed(path: Path) -> Speed:
    """Return the processor's speed from the file ``path``, or measure it (under 2 s) and write it there.

    Blocks: call it off the loop.
    """
    processor = processor_name()
    stored = read_json(path, Speed)
    if stored is not None and (stored.processor, stored.cores) == (processor, cores()):
        return stored
    fresh = Speed(processor, cores(), bandwidth(cores(), memory().free), compute())
    if not fresh.bandwidth:
        log.info("the processor's speed could not be measured; the next start tries again")
        return fresh
    save_json(path, fresh)
    return fresh


def processor_name() -> str:
    """Return the processor's model name."""
    for key in ("model name", "Hardware", "Model"):
        if value := _cpuinfo(key):
            return value
    return platform.processor() or platform.machine()


def bandwidth(threads: int, free: int) -> float:
    """Return the bytes per second that ``threads`` threads read together; 0.0 if it can't be measured.

    Uses at most a quarter of the ``free`` bytes of memory: with little memory the buffers are smaller, and
    nothing is measured if they would fit into caches or the threads can't be started.
    """
    size = min(_BUFFER, free // (8 * threads)) // 4096 * 4096
    library = ctypes.util.find_library("c")
    if size < MIB:
        return 0.0
    memcmp = ctypes.CDLL(library).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    rates: list[float] = [0.0] * threads
    barrier = threading.Barrier(threads, timeout=_BARRIER_SECONDS)

    def read() -> float:
        with mmap.mmap(-1, size) as first_map, mmap.mmap(-1, size) as second_map:
            first = (ctypes.c_char * size).from_buffer(first_map)
            second = (ctypes.c_char * size).from_buffer(second_map)
            # Pages that were never written all map to the same zero page.
            ctypes.memset(first, 1, size)
            ctypes.memset(second, 1, size)
            try:
                barrier.wait()
                begin = time.perf_counter()
                total = 0
                while (elapsed := time.perf_counter() - begin) < _MEASURE_SECONDS:
                    memcmp(ctypes.addressof(first), ctypes.addressof(second), size)
                    total += 2 * size
                return total / elapsed
            finally:
                del first, second

    def run(index: int) -> None:
        try:
            rates[index] = read()
        except (OSError, threading.BrokenBarrierError) as error:
            # A thread without a buffer must not keep the others waiting.
            barrier.abort()
            log.debug("memory can't be read for a measurement: %s", error)

    running: list[threading.Thread] = []
    try:
        for index in range(threads):
            thread = threading.Thread(target=run, args=(index,), daemon=True)
            thread.start()
            running.append(thread)
    except RuntimeError as error:  # no more threads are allowed
        barrier.abort()
        log.debug("memory can't be read by %d threads: %s", threads, error)
    for thread in running:
        thread.join()
    return sum(rates) if all(rates) else 0.0


def compute() -> float:
    """Estimate the operations per second of all cores in a matrix product, as llama.cpp achieves them."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    machine = platform.machine()
    lanes = next((width for flag, width in _LANES if flag in flags), 16 if machine == "arm64" else 8)
    return cores() * _clock() * lanes * _EFFICIENCY


def _clock() -> float:
    """Return the clock frequency in hertz."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        frequency = None
    if frequency is not None and (frequency.max or frequency.current):
        return float(frequency.max or frequency.current) * 1e6
    try:
        return float(_cpuinfo("cpu MHz")) * 1e6
    except ValueError:
        return 2e9


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""
