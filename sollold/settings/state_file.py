"""Writes and reads files in the state folder: atomically, and readable only by the daemon's user."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import tempfile
import threading
from pathlib import Path
from typing import TypeVar

import msgspec

from sollold.errors import system_reason
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.settings")

T = TypeVar("T")

_MAX_JSON_BYTES = 16 << 20
_TEMPORARY = re.compile(r"\.\d+-\d+\.new$")


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` by ``data``, readable only by its owner; a crash leaves the old or the new content.

    ``durable``: that also holds for a power failure, at the cost of waiting for the disk.

    Blocks on the disk: call it off the loop.

    Raises:
        OSError: it could not be written.
    """
    # Two threads may write the same file: the later one's content stays.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.new")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            # Not the temporary name, which differs each time; a write to a full disk names no file.
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed while they wrote to ``folder`` have left. Blocks.

    Call it only while no other process writes there.
    """
    for path in folder.glob("*.new"):
        if _TEMPORARY.search(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def keep_copy(path: Path, data: bytes) -> Path:
    """Keep ``data``, the content of a file that this release can't decode and replaces; return its new path.

    It may be what a fault of the disk has left, or written by a later release. Blocks.

    Raises:
        OSError: it could not be written.
    """
    copy = path.with_name(f"{path.name}.unread")
    write_whole(copy, data)
    return copy


def why_not_writable(folder: Path) -> str:
    """Return why nothing can be written to ``folder`` now, such as a full disk; else empty. Blocks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return system_reason(error)
    return ""


def close_to_others(path: Path) -> None:
    """Restrict ``path`` to its owner: restoring a backup may have opened it.

    Raises:
        OSError: it does not exist.
    """
    if path.stat().st_mode & 0o077:
        try:
            path.chmod(0o600)
        except PermissionError:
            # Restored by root: it is readable, which is no reason to refuse to run.
            name = shlex.quote(str(path))
            log.warning("%s can be read by others; run: sudo chmod 600 %s", path, name)


def read_bounded(path: Path, limit: int = 1 << 20) -> bytes:
    """Return the content of ``path``, at most ``limit`` bytes of it.

    Raises:
        OSError: it does not exist or can't be read.
    """
    with path.open("rb") as file:
        return file.read(limit)


def save_json(path: Path, value: object) -> bool:
    """Replace a JSON file. Return whether that succeeded; a failure is logged. Blocks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(value))
    except OSError as error:
        log.warning("%s can't be written: %s", path, system_reason(error))
        return False
    return True


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return the content of a JSON file; None if it is missing, or can't be read, which is logged. Blocks."""
    try:
        return msgspec.json.decode(read_bounded(path, _MAX_JSON_BYTES), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, *UNDECODABLE) as error:
        log.warning("%s can't be read, and is ignored: %s", path, error)
        return None
