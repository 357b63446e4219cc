"""The log file of one child process, rotated."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from io import FileIO
from pathlib import Path
from types import TracebackType

from sollold.settings.schema import MIB

log = logging.getLogger("sollold.engines")

ROTATE_BYTES = 4 * MIB
"""A file longer than this is renamed to ``<name>.1``, and what ``<name>.1`` was is gone."""
KEEP_DEPLOYMENTS = 20
"""Folders of ended deployments that are kept."""


class ProcessLog:
    """Writes a child's output. A full disk costs the log, never the child."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` to append; its folder is made.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        try:
            if self._size > ROTATE_BYTES:
                self._file.close()
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
    """To append, readable by its owner alone."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


def prune(folder: Path, spare: Collection[str] = (), keep: int = KEEP_DEPLOYMENTS) -> None:
    """Remove the logs of all but the newest ``keep`` deployments, never those of the live ones in ``spare``.

    One that can't be removed is left. Blocks.
    """
    found: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for one in folder.iterdir():
            with contextlib.suppress(OSError):
                if one.is_dir() and not one.is_symlink() and one.name not in spare:
                    found.append((one.stat().st_mtime, one))
    for _, old in sorted(found)[: max(0, len(found) - keep)]:
        with contextlib.suppress(OSError):
            for file in old.iterdir():
                file.unlink(missing_ok=True)
            old.rmdir()
