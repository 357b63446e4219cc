"""On-disk journal of child processes, by which processes left over from an earlier run are found and killed.

A pid alone may belong to another process after a restart, so each entry includes the start time. Processes
that the children started themselves are recognized by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil

from sollold.facts import dataclass
from sollold.settings.state_file import read_json, write_whole

log = logging.getLogger("sollold.engines")

_KILL_SECONDS = 10.0
"""A killed process that still exists after this many seconds is left to the system."""
MARK = "SOLLOLD_CHILD_OF"
"""Environment variable set for every child, and inherited by its children; see `Journal.mark`."""


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """A child process; ``started`` distinguishes it from a later process with the same pid."""

    pid: int
    started: str
    name: str
    deployment: str


class Journal:
    """The children of this node's daemon. Thread-safe; every call accesses the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: dict[int, ChildProcess] = {}

    @property
    def mark(self) -> str:
        """The value of `MARK` for this node's children, the same in every run of its daemon.

        It includes the folder's inode: daemons in containers use the same folder names, and see each other's
        processes if they share the host's pid namespace.
        """
        try:
            folder = self._path.parent.stat()
        except OSError:
            return str(self._path.absolute())
        return f"{folder.st_dev}:{folder.st_ino} {self._path.absolute()}"

    def add(self, pid: int, name: str, deployment: str) -> None:
        """Record a child that was just started.

        Raises:
            OSError: the journal can't be written.
        """
        with self._lock:
            self._entries[pid] = ChildProcess(pid, started(pid), name, deployment)
            self._write()

    def remove(self, pid: int) -> None:
        """Remove a child that has exited.

        Raises:
            OSError: the journal can't be written.
        """
        with self._lock:
            if self._entries.pop(pid, None) is not None:
                self._write()

    def kill_leftovers(self) -> list[ChildProcess]:
        """Kill processes left by an earlier run and wait until they are gone. Call it before any `add`.

        Returns the killed children.
        """
        with self._lock:
            journal = read_json(self._path, list[ChildProcess]) or []
            killed = [child for child in journal if _alive(child)]
            for child in killed:
                log.warning("killing %s (pid %d), left by an earlier run", child.name, child.pid)
                _kill(child.pid)
            for pid in (descendants := _marked(self.mark)):
                log.warning("killing pid %d, started by a child of an earlier run", pid)
                _kill(pid)
            deadline = time.monotonic() + _KILL_SECONDS
            ending = {child.pid: child.started for child in killed} | descendants
            while time.monotonic() < deadline and any(
                start_time and started(pid) == start_time for pid, start_time in ending.items()
            ):
                time.sleep(0.02)
            with contextlib.suppress(OSError):
                self._write()
        return killed

    def _write(self) -> None:
        # Whatever stops the machine stops the children too: the file need not survive that.
        write_whole(self._path, msgspec.json.encode(list(self._entries.values())), durable=False)


def started(pid: int) -> str:
    """Return a string that tells this process from any other with the same pid; empty if it is gone."""
    try:
        if sys.platform.startswith("linux"):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            fields = stat_fields(Path(f"/proc/{pid}"))
            return f"{boot} {fields[19]}" if fields[0] != "Z" else ""
        return repr(psutil.Process(pid).create_time())
    except (OSError, psutil.Error, IndexError):
        return ""


def stat_fields(folder: Path) -> list[str]:
    """Return the fields of a process's or thread's ``stat`` in proc(5), from the third on.

    Raises:
        OSError: it is gone.
    """
    # The second is the program's name in parentheses, which may contain anything, even half a letter.
    return (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()


def _marked(mark: str) -> dict[int, str]:
    """Return the readable processes with this mark: pid → result of `started`."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = started(int(folder.name))
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 9)


def _alive(child: ChildProcess) -> bool:
    return bool(child.started) and started(child.pid) == child.started
