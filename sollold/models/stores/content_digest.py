"""Identifies a model's content by a digest that is cheap and independent of where the files are.

A full sha256 of a 40 GB file takes a minute; so the digest covers each file's size, its bytes up to the first
tensor, and samples of the tensors. Two files that differ only in a few weights outside all samples would look
the same: quantizing or training changes every tensor, so no real pair does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from sollold.models.gguf.header import Header

_SAMPLES = 64
_SAMPLE = 4096
_PIECE = 1 << 20


def of_files(header: Header) -> str:
    """Return the hex sha256 of a model's content, its files in the header's order. Blocks: reads some MB.

    Raises:
        OSError: a file can't be read.
    """
    starts: dict[int, int] = {}
    for tensor in header.tensors:
        starts[tensor.file] = min(starts.get(tensor.file, tensor.offset), tensor.offset)
    pieces = [_of_file(path, starts.get(index)) for index, path in enumerate(header.files)]
    return joined(pieces)


def joined(digests: Iterable[str]) -> str:
    """Return one digest for several, in order; a single one is returned unchanged."""
    parts: Sequence[str] = tuple(digests)
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_file(path: str, start: int | None) -> str:
    """Return the digest of one file.

    ``start``: offset of the first tensor; None: there are no tensors, so the file is read as a whole.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = size if start is None else start
        digest.update(b"%d %d\n" % (size, head))
        remaining = head
        while remaining > 0 and (piece := file.read(min(remaining, _PIECE))):
            digest.update(piece)
            remaining -= len(piece)
        rest = size - head
        offsets = {head + rest * k // _SAMPLES for k in range(_SAMPLES)} if rest else set()
        for offset in sorted({*offsets, max(head, size - _SAMPLE)}):
            digest.update(os.pread(file.fileno(), _SAMPLE, offset))
    return digest.hexdigest()
