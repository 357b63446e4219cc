"""Copies the data of single tensors into files of their own. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sollold.engines.commands import WantedTensor
from sollold.models.transfer.download import BlockingSource, Stop
from sollold.models.transfer.file_digest import digest_between
from sollold.models.transfer.partial_file import write_all

CHUNK_BYTES = 8 << 20
"""Size of the pieces in which a tensor is copied or received."""


def copy_bytes(
    path: str, start: int, size: int, target: Path, stop: Stop, notify: Callable[[], None] = lambda: None
) -> None:
    """Copy part of a file within the kernel, sharing blocks if the file system can. Blocks.

    ``notify`` is called after each chunk.

    Raises:
        OSError: reading or writing failed, the file is too short, or ``stop`` was set.
    """
    with ExitStack() as stack:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, source)
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, output)
        copied, in_kernel = 0, True
        while copied < size:
            if stop.stopped:
                raise InterruptedError("the copy was cancelled")
            count = min(CHUNK_BYTES, size - copied)
            try:
                if in_kernel:
                    count = os.copy_file_range(source, output, count, start + copied, copied)
                else:
                    count = os.sendfile(output, source, start + copied, count)
            except OSError:
                if not in_kernel or copied:
                    raise
                in_kernel = False  # Not supported between these file systems.
                continue
            if not count:
                raise OSError(f"{path} is too short")
            copied += count
            notify()


def fetch_chunk(
    source: BlockingSource, tensor: WantedTensor, start: int, end: int, file: Path, stop: Stop
) -> None:
    """Receive part of a tensor into its file. Blocks.

    Raises:
        SourceError, OSError: receiving or writing failed.
    """
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(offset: int, data: memoryview) -> None:
        write_all(output, offset - tensor.start, data)

    try:
        source.fetch_range(tensor.file, start, end, write, stop)
    finally:
        os.close(output)


def digest_file(file: Path, base: int, start: int, end: int, key: str) -> str:
    """Digest part of a tensor in a ``file`` of its own; in the model's file the tensor begins at ``base``."""
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return digest_between(handle, start - base, end - base, key)
    finally:
        os.close(handle)


def copy_and_digest(
    path: str, base: int, target: Path, stop: Stop, notify: Callable[[], None], start: int, end: int, key: str
) -> str:
    """Copy part of the model's file to a tensor's own, which begins at ``base``; return its digest."""
    with ExitStack() as stack:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, source)
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, output)
        place = start - base

        def write(piece: bytes) -> None:
            nonlocal place
            write_all(output, place, piece)
            place += len(piece)
            notify()

        return digest_between(source, start, end, key, lambda: stop.stopped, write)
