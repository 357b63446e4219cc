"""Writes small GGUF files (version 3, little endian): the demo model, and models for tests.

A file appears under its name only when it is complete. Tensors of zeros become holes in the file, which take
no time and, if the file system supports holes, no space. Blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from sollold.facts import dataclass
from sollold.models.gguf.tensor_types import TENSOR_TYPES

MetadataValue = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
"""Integers are written as u32 (i32 below zero, u64 when larger), arrays of them as i32; floats as f32."""

Chunk = bytes | bytearray | memoryview

_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written.

    ``shape``: innermost dimension first. ``data``: yields its bytes in pieces; None for zeros.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    data: Callable[[], Iterable[Chunk]] | None = None

    @property
    def size(self) -> int:
        """Size of its data, in bytes."""
        rows = 1
        for length in self.shape[1:]:
            rows *= length
        return TENSOR_TYPES[self.type].row(self.shape[0]) * rows


def write(path: str | Path, metadata: Mapping[str, MetadataValue], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF file, or leave the folder unchanged on error.

    Raises:
        OSError: the folder can't be written, or the disk is full.
        ValueError: a tensor's data does not match its shape and type in length.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, metadata, tensors)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _write(file: BinaryIO, metadata: Mapping[str, MetadataValue], tensors: Sequence[NewTensor]) -> None:
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        head += _string(tensor.name)
        head += struct.pack(f"<I{dimensions}QIQ", dimensions, *tensor.shape, tensor.type, offset)
        offset += _padded(tensor.size)
    start = _padded(len(head))
    file.write(head)
    for tensor in tensors:
        if tensor.data is not None:
            file.seek(start)
            written = sum(file.write(chunk) for chunk in tensor.data())
            if written != tensor.size:
                raise ValueError(f"tensor {tensor.name}: {written} bytes of data for {tensor.size}")
        start += _padded(tensor.size)
    file.truncate(start)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: MetadataValue) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        if value < 0:
            return struct.pack("<Ii", 5, value)
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 9) + _array(value)


def _array(values: Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]) -> bytes:
    count = len(values)
    first = values[0] if count else 0
    if isinstance(first, str):
        return struct.pack("<IQ", 8, count) + b"".join(_string(str(text)) for text in values)
    if isinstance(first, bool):
        return struct.pack(f"<IQ{count}?", 7, count, *values)
    if isinstance(first, int):
        return struct.pack(f"<IQ{count}i", 5, count, *values)
    return struct.pack(f"<IQ{count}f", 6, count, *values)
