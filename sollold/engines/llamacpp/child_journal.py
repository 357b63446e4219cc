"""Which child processes run, on disk: what an earlier run left behind is found and ended.

A pid alone would name a stranger after a restart, so each entry carries when its process started. What the
children have started themselves is known by a mark in its environment.
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
from sollold.settings.state_file import write_whole

log = logging.getLogger("sollold.engines")

_KILL_SECONDS = 10.0
"""A process that was killed and is still there after so long is left to the system."""
MARK = "SOLLOLD_CHILD_OF"
"""In the environment of every child: whose it is, see `Journal.mark`. What it starts has it too."""


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """A child process: ``started`` tells it from another that has got its pid since."""

    pid: int
    started: str
    name: str
    deployment: str


class Journal:
    """The children of this node's daemon. Usable from any thread; every call touches the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: dict[int, ChildProcess] = {}

    @property
    def mark(self) -> str:
        """The value of `MARK` for this node's children, in every run of its daemon.

        With the folder's own number: daemons in containers have folders of one name each, and see each
        other's processes where they share the numbers of the host's.
        """
        try:
            folder = self._path.parent.stat()
        except OSError:
            return str(self._path.absolute())
        return f"{folder.st_dev}:{folder.st_ino} {self._path.absolute()}"

    def add(self, pid: int, name: str, deployment: str) -> None:
        """Note a child that was just started.

        Raises:
            OSError: it can't be written.
        """
        with self._lock:
            self._entries[pid] = ChildProcess(pid, started(pid), name, deployment)
            self._write()

    def remove(self, pid: int) -> None:
        """The child is gone.

        Raises:
            OSError: it can't be written.
        """
        with self._lock:
            if self._entries.pop(pid, None) is not None:
                self._write()

    def kill_leftovers(self) -> list[ChildProcess]:
        """Kill what an earlier run left behind and wait until it is gone. Call it before any `add`.

        Returns what was killed.
        """
        with self._lock:
            killed = [one for one in self._read() if _alive(one)]
            for one in killed:
                log.warning("killing %s (pid %d), left by an earlier run", one.name, one.pid)
                _kill(one.pid)
            for pid in (descendants := _marked(self.mark)):
                log.warning("killing pid %d, started by a child of an earlier run", pid)
                _kill(pid)
            deadline = time.monotonic() + _KILL_SECONDS
            ending = {one.pid: one.started for one in killed} | descendants
            while time.monotonic() < deadline and any(
                then and started(pid) == then for pid, then in ending.items()
            ):
                time.sleep(0.02)
            with contextlib.suppress(OSError):
                self._write()
        return killed

    def _read(self) -> list[ChildProcess]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[ChildProcess])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the journal %s can't be read: %s", self._path, error)
            return []

    def _write(self) -> None:
        # What ends the whole machine ends the children: it need not outlive that.
        write_whole(self._path, msgspec.json.encode(list(self._entries.values())), durable=False)


def started(pid: int) -> str:
    """What tells this process from any other that has or had its pid; empty when it is gone."""
    try:
        if sys.platform.startswith("linux"):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The command's name stands in brackets and may hold anything; field 22 counts from behind it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return f"{boot} {fields[19]}" if fields[0] != "Z" else ""
        return repr(psutil.Process(pid).create_time())
    except (OSError, psutil.Error, IndexError):
        return ""


def _marked(mark: str) -> dict[int, str]:
    """Processes with this mark, as far as they can be looked at: pid → what `started` tells of it."""
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


def _alive(one: ChildProcess) -> bool:
    return bool(one.started) and started(one.pid) == one.started
