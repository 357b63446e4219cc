"""Reads, on request, the long arrays (such as a vocabulary) that parsing a header skips."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from sollold.models.gguf.header import Array, Header

_MAX_BYTES, _MAX_VALUES = 32 << 20, 1 << 21
"""Limits over all arrays of a header. A vocabulary of 256,000 tokens has 10 MB, including its merges."""
_LENGTH = struct.Struct("<Q")

Values = list[str | int | float | bool]


def long_arrays(header: Header) -> dict[str, Values]:
    """Return the values of each array that has none in the header. Blocks.

    Arrays over the limits are left out.

    Raises:
        OSError: the file can't be read any more.
    """
    found: dict[str, Values] = {}
    bytes_left, values_left = _MAX_BYTES, _MAX_VALUES
    with Path(header.files[0]).open("rb") as file:
        for key, array in header.metadata.items():
            if not isinstance(array, Array) or array.values is not None:
                continue
            size = array.span[1] - array.span[0]
            if size > bytes_left or array.length > values_left:
                continue
            bytes_left -= size
            values_left -= array.length
            found[key] = _values(file, array)
    return found


def _values(file: BinaryIO, array: Array) -> Values:
    begin, end = array.span
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) < end - begin:
        raise OSError("the file shrank while it was being read")
    if array.scalar:
        return list(struct.unpack(f"<{array.length}{array.scalar}", data))
    texts: Values = []
    position = 0
    for _ in range(array.length):
        start = position + _LENGTH.size
        position = start + int(_LENGTH.unpack_from(data, position)[0])
        texts.append(data[start:position].decode("utf-8", "replace"))
    return texts
