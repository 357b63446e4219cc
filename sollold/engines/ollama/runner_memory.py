"""RAM that Ollama's runners actually use, which is what unloading a model would free.

``/api/ps`` includes buffers that a model may never touch. A runner is found by the model file on its command
line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import psutil

SCAN_SECONDS = 10.0
"""Minimum interval between searches of all processes for unknown runners, in seconds."""


class RunnerMemory:
    """Resident memory of runners, by the file that each has loaded. Its methods block briefly."""

    def __init__(self) -> None:
        self._runners: dict[str, psutil.Process] = {}
        self._scanned = float("-inf")

    def resident(self, files: Iterable[str], now: float) -> dict[str, int]:
        """Return file → bytes of RAM that its runner holds, without files whose runner is not found.

        ``now``: seconds of any clock, the same in all calls.
        """
        wanted = {PurePath(file).name: file for file in files}
        found = {name: size for name in wanted if (size := self._size_of(name)) is not None}
        if found.keys() != wanted.keys() and now - self._scanned >= SCAN_SECONDS:
            self._scanned = now
            self._runners = _runners(wanted)
            found = {name: size for name in wanted if (size := self._size_of(name)) is not None}
        return {wanted[name]: size for name, size in found.items()}

    def _size_of(self, name: str) -> int | None:
        runner = self._runners.get(name)
        if runner is None:
            return None
        with contextlib.suppress(psutil.Error):
            # The pid may have been reused by another process.
            if runner.is_running():
                return int(runner.memory_info().rss)
        self._runners.pop(name, None)
        return None


def _runners(wanted: Mapping[str, str]) -> dict[str, psutil.Process]:
    """Return file name → the Ollama process that has it on its command line."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or ()
        name = next((PurePath(word).name for word in words if PurePath(word).name in wanted), "")
        # This daemon's own llama-servers read the same files.
        if name and process.info["ppid"] != os.getpid() and _is_ollamas(process, words):
            found[name] = process
    return found


def _is_ollamas(process: psutil.Process, words: Iterable[str]) -> bool:
    """Return whether the process is an Ollama or the child of one."""
    if "ollama" in PurePath(next(iter(words), "")).name:
        return True
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        return parent is not None and "ollama" in parent.name()
    return False
