"""Parses the header of one GGUF file: metadata and the table of tensors, never tensor data.

The format is ggml/docs/gguf.md, versions 2 and 3, little endian. Large arrays (such as a vocabulary) are
skipped, but their lengths are kept. Every count is checked against the rest of the file before anything is
allocated, and the work is bounded too, so that a hostile file costs little.
"""

from __future__ import annotations

import contextlib
import struct
from typing import BinaryIO

from sollold.models.gguf.header import Array, GgufError, Header, Tensor, Value
from sollold.models.gguf.tensor_types import TENSOR_TYPES

_WINDOW = 1 << 20
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 255
_MAX_TEXT_BYTES = 16 << 20
_MAX_TOTAL_BYTES = 64 << 20
_MAX_KEYS = 65_536
_MAX_TENSORS = 131_072
_MAX_NUMBERS = 1 << 20
_MAX_STRINGS = 1 << 24
_KEPT_NUMBERS = 4_096
_KEPT_STRINGS = 64

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Truncated(GgufError):
    """The file has fewer bytes than its stated size."""


def parse(file: BinaryIO, path: str, size: int) -> Header:
    """Parse the header at the beginning of ``file``, which has ``size`` bytes; ``path`` is for errors.

    Raises:
        Truncated: ``file`` has fewer bytes than ``size``.
        GgufError: the header is malformed.
    """
    return _parse(_Window(file, path, size))


class _Window:
    """A file read in pieces, with a position; reading beyond the end raises an error."""

    __slots__ = ("_base", "_data", "_file", "_text", "path", "position", "size")

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self._file = file
        self._data = b""
        self._base = 0
        self._text = _MAX_TOTAL_BYTES
        self.path = path
        self.size = size
        self.position = 0

    def error(self, reason: str) -> GgufError:
        return GgufError(self.path, self.position, reason)

    @property
    def left(self) -> int:
        return self.size - self.position

    def take_bytes(self, count: int) -> bytes:
        """Return the next bytes. The caller has checked ``count`` against a limit."""
        if count > self.left:
            raise self.error(f"the file is truncated: {count} bytes expected, {max(self.left, 0)} left")
        start = self.position - self._base
        if start < 0 or start + count > len(self._data):
            self._fill(count)
            start = 0
        self.position += count
        return self._data[start : start + count]

    def _fill(self, count: int) -> None:
        self._file.seek(self.position)
        self._data = self._file.read(min(max(count, _WINDOW), self.left))
        self._base = self.position
        if len(self._data) < count:
            raise Truncated(self.path, self.position, "the file shrank while it was being read")

    def u32(self) -> int:
        return int(_U32.unpack(self.take_bytes(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take_bytes(8))[0])

    def string(self, limit: int, label: str) -> str:
        length = self.u64()
        if length > limit:
            raise self.error(f"{label} of {length} bytes; the limit is {limit}")
        self._text -= length
        if self._text < 0:
            raise self.error(f"more than {_MAX_TOTAL_BYTES} bytes of text in the header")
        return self.take_bytes(length).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Skip ``count`` strings."""
        unpack = _U64.unpack_from
        skipped = 0
        while skipped < count:
            start = self.position - self._base
            if start < 0 or start + 8 > len(self._data):
                if self.left < 8:
                    raise self.error(
                        f"the file is truncated in an array: {count - skipped} more strings expected"
                    )
                self._fill(8)
                start = 0
            data = self._data
            # The end of the window raises an error: checking for it at every string would cost as much again.
            with contextlib.suppress(struct.error, OverflowError):
                for skipped in range(skipped, count):  # noqa: B007, B020
                    start += 8 + unpack(data, start)[0]
                skipped = count
            self.position = self._base + start
            if self.position > self.size:
                raise self.error("the file is truncated in an array of strings, or a length in it is wrong")


def _parse(window: _Window) -> Header:
    if window.size < 24:
        raise window.error(f"the file has {window.size} bytes, too few for a GGUF header")
    magic = window.take_bytes(4)
    if magic != b"GGUF":
        raise GgufError(window.path, 0, f"not a GGUF file: it begins with {magic!r}")
    version = window.u32()
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version >> 24 in (1, 2, 3):
            reason = "a big-endian GGUF file, but llama.cpp reads little-endian files here: convert it again"
        else:
            reason = f"GGUF version {version} is not supported; only 2 and 3 are"
        raise GgufError(window.path, 4, reason)
    tensor_count, key_count = window.u64(), window.u64()
    if key_count > min(_MAX_KEYS, window.left // 13):
        raise window.error(f"{key_count} metadata keys declared, more than the file can hold")
    if tensor_count > min(_MAX_TENSORS, window.left // 24):
        raise window.error(f"{tensor_count} tensors declared, more than the file can hold")
    metadata = _metadata(window, key_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise window.error("general.alignment is not a power of two")
    tensors = _tensors(window, tensor_count, alignment)
    return Header(files=(window.path,), size=window.size, version=version, metadata=metadata, tensors=tensors)


def _metadata(window: _Window, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    strings, numbers = _MAX_STRINGS, _MAX_NUMBERS
    for _ in range(count):
        key = window.string(_MAX_KEY_BYTES, "a metadata key")
        if not key or key in metadata:
            raise window.error(f"metadata key {key!r} is {'repeated' if key else 'empty'}")
        kind = window.u32()
        if kind == _STRING:
            metadata[key] = window.string(_MAX_TEXT_BYTES, f"the text of {key!r}")
        elif kind == _ARRAY:
            array = _array(window, key, strings)
            strings -= array.length
            numbers -= len(array.values or ())
            if numbers < 0:
                raise window.error("more arrays in the metadata than are plausible")
            metadata[key] = array
        elif kind in _SCALARS:
            scalar = _SCALARS[kind]
            metadata[key] = scalar.unpack(window.take_bytes(scalar.size))[0]
        else:
            raise window.error(f"metadata key {key!r} has the unknown type {kind}")
    return metadata


def _array(window: _Window, key: str, max_strings: int) -> Array:
    kind, length = window.u32(), window.u64()
    if kind == _STRING:
        if length > window.left // 8:
            raise window.error(f"array {key!r} declares {length} strings, more than the file can hold")
        if length > max_strings:
            raise window.error(f"array {key!r} declares {length} strings, more than is plausible")
        if length <= _KEPT_STRINGS:
            return Array(
                length, tuple(window.string(_MAX_TEXT_BYTES, f"a text of {key!r}") for _ in range(length))
            )
        begin = window.position
        window.skip_strings(length)
        return Array(length, None, (begin, window.position))
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise window.error(f"array {key!r} has elements of the unknown type {kind}")
    if length > window.left // scalar.size:
        raise window.error(f"array {key!r} declares {length} elements, more than the file can hold")
    if length > _KEPT_NUMBERS:
        begin = window.position
        window.position += length * scalar.size
        return Array(length, None, (begin, window.position), scalar.format[-1])
    return Array(
        length, struct.unpack(f"<{length}{scalar.format[-1]}", window.take_bytes(length * scalar.size))
    )


def _tensors(window: _Window, count: int, alignment: int) -> tuple[Tensor, ...]:
    listed: list[tuple[str, tuple[int, ...], int, int, int, int]] = []
    seen: set[str] = set()
    for _ in range(count):
        position = window.position
        name = window.string(_MAX_NAME_BYTES, "a tensor's name")
        if name in seen:
            raise window.error(f"duplicate tensor {name!r}")
        seen.add(name)
        dimensions = window.u32()
        if dimensions > 4:
            raise window.error(f"tensor {name!r} has {dimensions} dimensions; the limit is 4")
        shape = struct.unpack(f"<{dimensions}Q", window.take_bytes(8 * dimensions)) or (1,)
        kind, offset = window.u32(), window.u64()
        type_ = TENSOR_TYPES.get(kind)
        if type_ is None:
            raise window.error(f"tensor {name!r} has type {kind}, which llama.cpp does not read")
        rows = 1
        for length in shape[1:]:
            rows *= length
        if shape[0] % type_.block:
            raise window.error(
                f"tensor {name!r} has rows of {shape[0]}, not a multiple of {type_.name}'s {type_.block}"
            )
        size = type_.row(shape[0]) * rows
        if offset % alignment:
            raise window.error(f"tensor {name!r} begins at {offset}, which is not aligned to {alignment}")
        listed.append((name, shape, kind, size, offset, position))
    data = -(-window.position // alignment) * alignment
    for name, _, _, size, offset, position in listed:
        end = data + offset + size
        if end > window.size:
            raise GgufError(
                window.path,
                position,
                f"the file is truncated: tensor {name!r} ends at byte {end}, the file has {window.size}",
            )
    return tuple(
        Tensor(name, shape, kind, size, data + offset) for name, shape, kind, size, offset, _ in listed
    )
