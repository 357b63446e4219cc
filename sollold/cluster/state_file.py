"""Small files that must be whole after a crash: written beside, synced, then put in place."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, readable by its owner alone; a crash leaves the old or the new.

    Blocks for the disk: call it off the loop.

    Raises:
        OSError: it could not be written.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_bounded(path: Path, limit: int = 1 << 20) -> bytes:
    """What ``path`` holds, at most ``limit`` bytes of it.

    Raises:
        OSError: it is not there or can't be read.
    """
    with path.open("rb") as file:
        return file.read(limit)
