"""The rotated log file of a child process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from io import FileIO
from pathlib import Path

from sollold.settings.schema import MIB

log = logging.getLogger("sollold.engines")

ROTATE_BYTES = 4 * MIB
"""Size in bytes beyond which a file is renamed to ``<name>.1``, replacing the previous one."""
KEEP_DEPLOYMENTS = 20
"""Number of ended deployments whose log folders are kept."""


class ProcessLog:
    """Writes a child's output. If the disk is full, log lines are lost, but the child keeps running."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending, creating its folder.

        Raises:
            OSError: it can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self._file = _open(path)
        self._size = self._file.tell()
        self._failed = False

    def __enter__(self) -> ProcessLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        try:
            if self._size > ROTATE_BYTES:
                self._file.close()
                with contextlib.suppress(FileNotFoundError):  # renamed before, but not opened again
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = _open(self._path)
                self._size = 0
            self._size += self._file.write(data) or 0
            self._failed = False
        except (OSError, ValueError) as error:
            if not self._failed:
                log.warning("%s can't be written: %s", self._path, error)
            self._failed = True


def _open(path: Path) -> FileIO:
    """Open for appending, readable only by its owner."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


def prune(folder: Path, spare: Collection[str] = (), keep: int = KEEP_DEPLOYMENTS) -> None:
    """Delete the logs of all but the newest ``keep`` deployments, never those of the live ones in ``spare``.

    Folders that can't be deleted are skipped. Blocks.
    """
    found: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                if entry.is_dir() and not entry.is_symlink() and entry.name not in spare:
                    found.append((entry.stat().st_mtime, entry))
    for _, old in sorted(found)[: max(0, len(found) - keep)]:
        with contextlib.suppress(OSError):
            for file in old.iterdir():
                file.unlink(missing_ok=True)
            old.rmdir()
