"""Reads settings files so that nothing at that path, such as a pipe, can block forever."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path

_PIPE_SECONDS = 5.0
_MAX_BYTES = 16 << 20


def read_file(path: Path) -> bytes:
    """Return the file's content. It may be a pipe, such as a shell's ``<(…)``, if something is written to it.

    Raises:
        OSError: it can't be read, or is too long.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        pipe = stat.S_ISFIFO(os.fstat(handle).st_mode)
        content = bytearray()
        while True:
            if pipe and not poll.poll(_PIPE_SECONDS * 1000):
                reason = f"it is a pipe to which nothing was written for {_PIPE_SECONDS:g} s"
                raise OSError(errno.ETIMEDOUT, reason)
            piece = os.read(handle, 1 << 16)
            if not piece:
                return bytes(content)
            content += piece
            if len(content) > _MAX_BYTES:
                raise OSError(errno.EFBIG, f"it is larger than {_MAX_BYTES >> 20} MiB")
    finally:
        os.close(handle)
