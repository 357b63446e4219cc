"""How files of the state folder are written and read: whole, and by the daemon's own user alone."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import tempfile
from pathlib import Path

log = logging.getLogger("sollold.settings")


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` by ``data``, readable by its owner alone; a crash leaves the old or the new.

    ``durable``: a power failure does so too, at the price of waiting for the disk.

    Blocks for the disk: call it off the loop.

    Raises:
        OSError: it could not be written.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        if isinstance(error, OSError) and error.filename is None:
            # A write to a full disk does not say where.
            error.filename = str(path)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written to ``folder`` now, such as for a full disk; empty when it can. Blocks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def close_to_others(path: Path) -> None:
    """Leave ``path`` to its owner alone: a backup that was restored may have opened it.

    Raises:
        OSError: it is not there.
    """
    if path.stat().st_mode & 0o077:
        try:
            path.chmod(0o600)
        except PermissionError:
            # Restored by root: it can be read, which is no reason to serve nobody.
            name = shlex.quote(str(path))
            log.warning("%s can be read by others; run: sudo chmod 600 %s", path, name)


def read_bounded(path: Path, limit: int = 1 << 20) -> bytes:
    """What ``path`` holds, at most ``limit`` bytes of it.

    Raises:
        OSError: it is not there or can't be read.
    """
    with path.open("rb") as file:
        return file.read(limit)
