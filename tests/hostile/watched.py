"""A daemon that records stalls of its event loop: ``python -m tests.hostile.watched FILE run …``.

A stall is the time between two beats of the loop in which its thread ran or waited for anything but the CPU.
CPU time of other processes does not count. Each stall is a line of JSON in FILE with the thread's stack.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TextIO

import uvloop

BEAT = 0.005
MIN_STALL = 0.03
"""Minimum length in seconds of a recorded stall."""


class LoopWatch:
    """Measures the event loop on which `beat` runs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._thread = threading.get_ident()
        # Nanoseconds of CPU time and of waiting for a CPU.
        self._account = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._collecting = self._collected = 0.0
        gc.callbacks.append(self._on_gc)
        self._last = time.monotonic()
        self._seen: dict[str, int] = {}
        threading.Thread(target=self._sample_stacks, daemon=True, name="loop watch").start()

    async def beat(self) -> None:
        """Record stalls until cancelled."""
        worked, waited = self._read()
        while True:
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            worked_now, waited_now = self._read()
            stopped = now - self._last - (waited_now - waited) - BEAT
            if stopped >= MIN_STALL:
                self._record(stopped, worked_now - worked)
            self._seen, self._collected = {}, 0.0
            self._last, worked, waited = now, worked_now, waited_now

    def _record(self, stopped: float, worked: float) -> None:
        where = max(self._seen, key=lambda stack: self._seen[stack], default="")
        line = {"stopped": stopped, "worked": worked, "collected": self._collected, "where": where}
        with contextlib.suppress(ValueError):
            self._out.write(json.dumps(line) + "\n")
            self._out.flush()

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        now = time.thread_time()
        if threading.get_ident() == self._thread and phase == "stop":
            self._collected += now - self._collecting
        self._collecting = now

    def _sample_stacks(self) -> None:
        """Sample the loop thread's stack while it is late. If it holds the GIL, sample afterwards."""
        while True:
            time.sleep(0.01)
            if time.monotonic() - self._last > 0.02:
                frames = traceback.extract_stack(sys._current_frames().get(self._thread))[-8:]
                stack = " < ".join(
                    f"{entry.filename[-40:]}:{entry.lineno} {entry.name}" for entry in reversed(frames)
                )
                self._seen[stack] = self._seen.get(stack, 0) + 1

    def _read(self) -> tuple[float, float]:
        worked, waited, _ = os.pread(self._account, 100, 0).split()
        return int(worked) / 1e9, int(waited) / 1e9


def release_memory(number: int, frame: object) -> None:
    """Return unused memory to the system, so that RSS shows memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    """Run the command line of sollold with a monitored event loop."""
    name = sys.argv.pop(1)
    run = uvloop.run

    def watched(main: Coroutine[Any, Any, Any], **options: Any) -> Any:
        out = Path(name).open("w")  # noqa: SIM115

        async def both() -> Any:
            watch = asyncio.create_task(LoopWatch(out).beat())
            try:
                return await main
            finally:
                watch.cancel()

        return run(both(), **options)

    uvloop.run = watched
    signal.signal(signal.SIGUSR2, release_memory)
    from sollold.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
