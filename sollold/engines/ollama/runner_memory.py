"""What an Ollama's runners really hold of this machine's RAM: that is what unloading a model frees.

``/api/ps`` counts buffers that a model may never touch. A runner's command line names the file that it has
loaded, so its process is found by that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import psutil

SCAN_SECONDS = 10.0
"""Between two looks through all processes for runners that are not known."""


class RunnerMemory:
    """The resident bytes of runners, by the file that each has loaded. Its methods block a little."""

    def __init__(self) -> None:
        self._runners: dict[str, psutil.Process] = {}
        self._scanned = float("-inf")

    def resident(self, files: Iterable[str], now: float) -> dict[str, int]:
        """File → bytes of RAM that its runner holds; without those whose runner is not found.

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
            # A pid that was given to another process since is no runner of ours.
            if runner.is_running():
                return int(runner.memory_info().rss)
        self._runners.pop(name, None)
        return None


def _runners(wanted: Mapping[str, str]) -> dict[str, psutil.Process]:
    """Name of a file → the process of an Ollama that has it on its command line."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or ()
        name = next((PurePath(word).name for word in words if PurePath(word).name in wanted), "")
        # This daemon's own llama-servers read the same files.
        if name and process.info["ppid"] != os.getpid() and _is_ollamas(process, words):
            found[name] = process
    return found


def _is_ollamas(process: psutil.Process, words: Iterable[str]) -> bool:
    """Whether an Ollama runs it: it is one, or a child of one."""
    if "ollama" in PurePath(next(iter(words), "")).name:
        return True
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        return parent is not None and "ollama" in parent.name()
    return False
