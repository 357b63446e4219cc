"""Holds back the hashes that llama-server sends to a worker before a tensor's data. Sans-I/O.

A request of llama.cpp's RPC is a command byte, an eight-byte payload size (little-endian) and the payload.
For a tensor over 10 MiB ``SET_TENSOR_HASH`` comes first; ``SET_TENSOR`` with the data follows only if the
worker replies that it has no file of that hash. Holding back that one request for a moment leaves time to put
the file in its place (ggml/src/ggml-rpc/ggml-rpc.cpp, protocol 7.0.0).
"""

from __future__ import annotations

import struct

from sollold.facts import dataclass

_SET_TENSOR_HASH, _GRAPH_COMPUTE, _GRAPH_RECOMPUTE = 7, 10, 16
_HEAD = struct.Struct("<BQ")
_TENSOR = struct.Struct("<8xI8x4I")
"""``rpc_tensor``: id, type, buffer, ne."""
_NAME = slice(228, 292)
_PLACE = struct.Struct("<QQ")
"""After the tensor: offset of its data, and their hash."""
_PLACE_OFFSET = 296
_SIZE = _PLACE_OFFSET + _PLACE.size
FOUND = struct.pack("<QB", 1, 1)
"""A worker's reply if it has read a file of this hash: eight bytes of size, and one byte."""
HASHED_OVER = 10 * 1024 * 1024
"""Tensors larger than this, in bytes, are requested by their hash."""


@dataclass(frozen=True, slots=True)
class HeldHash:
    """A ``SET_TENSOR_HASH`` that is being held back. ``name``, ``type`` and ``shape`` as in the model's file.

    ``shape`` has four dimensions, ``hash`` is the name of the worker's cache file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    hash: str


class HashFrames:
    """The bytes of one connection to the worker.

    Attributes:
        asked: the hash held back until `release`; None if there is none.
        over: loading has ended, since the model computes: everything passes unchanged from now on.
    """

    def __init__(self) -> None:
        self.asked: HeldHash | None = None
        self.over = False
        self._rest = b""
        self._left = 0

    @property
    def held(self) -> int:
        """Number of bytes held back."""
        return len(self._rest)

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that may pass after ``data`` has been received."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self.over:
            return data
        if self.asked is not None:
            self._rest = data
            return b""
        end = self._passable(data)
        self._rest = data[end:]
        return data if end == len(data) else data[:end]

    def release(self) -> bytes:
        """Return the bytes held back, up to the next hash."""
        self.asked = None
        self._left = _HEAD.size + _SIZE
        return self.feed(b"")

    def release_all(self) -> bytes:
        """Stop watching; return all bytes held back."""
        self.asked, self.over = None, True
        return self.feed(b"")

    def _passable(self, data: bytes) -> int:
        """Return how many bytes precede the next hash."""
        offset, end = 0, len(data)
        while offset < end:
            if self._left:
                step = min(self._left, end - offset)
                self._left -= step
                offset += step
                continue
            if end - offset < _HEAD.size:
                break
            command, size = _HEAD.unpack_from(data, offset)
            if command in (_GRAPH_COMPUTE, _GRAPH_RECOMPUTE):
                self.over = True
                return end
            if command != _SET_TENSOR_HASH or size != _SIZE:
                self._left = _HEAD.size + size
                continue
            if end - offset < _HEAD.size + _SIZE:
                break
            self.asked = _held_hash(data[offset + _HEAD.size : offset + _HEAD.size + _SIZE])
            break
        return offset


def _held_hash(payload: bytes) -> HeldHash:
    kind, *shape = _TENSOR.unpack_from(payload)
    offset, hash = _PLACE.unpack_from(payload, _PLACE_OFFSET)
    name = payload[_NAME].split(b"\0", 1)[0].decode("utf-8", "replace")
    return HeldHash(name, kind, tuple(shape), offset, f"{hash:016x}")
