"""Watches what llama-server says to a worker while it loads: the hash of a tensor before its bytes. Sans-I/O.

A request of llama.cpp's RPC is a byte that names the command, eight bytes of size (little-endian) and the
payload. For a tensor over 10 MiB ``SET_TENSOR_HASH`` comes first; ``SET_TENSOR`` with the bytes follows only
when the worker answers that it has no file of that hash. So whoever holds that one request back for a moment
can put the file in its place (ggml/src/ggml-rpc/ggml-rpc.cpp, protocol 7.0.0).
"""

from __future__ import annotations

import struct

from sollold.facts import dataclass

_SET_TENSOR_HASH, _GRAPH_COMPUTE, _GRAPH_RECOMPUTE = 7, 10, 16
_HEAD = struct.Struct("<BQ")
_TENSOR = struct.Struct("<8xI8x4I")
"""Of ``rpc_tensor``: id, type, buffer, ne."""
_NAME = slice(228, 292)
_PLACE = struct.Struct("<QQ")
"""Behind the tensor: offset of its bytes, and their hash."""
_PLACE_AT = 296
_SIZE = _PLACE_AT + _PLACE.size
FOUND = struct.pack("<QB", 1, 1)
"""What a worker answers that has a file of the hash, and has read it: eight bytes of size, and one."""
HASHED_OVER = 10 * 1024 * 1024
"""Tensors of more bytes than that are asked for by their hash."""


@dataclass(frozen=True, slots=True)
class HeldHash:
    """A hash that is being held back. ``name``, ``type`` and ``shape`` as in the model's file.

    ``shape`` has four dimensions, ``hash`` is the name of the worker's file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    hash: str


class HashFrames:
    """One connection's bytes towards the worker.

    Attributes:
        asked: the hash that is held back until `release`; None while nothing is.
        over: the model computes, so it is loaded: from now on everything passes as it is.
    """

    def __init__(self) -> None:
        self.asked: HeldHash | None = None
        self.over = False
        self._rest = b""
        self._left = 0

    @property
    def held(self) -> int:
        """Bytes that are held back."""
        return len(self._rest)

    def feed(self, data: bytes) -> bytes:
        """The bytes that may pass now that ``data`` has come."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self.over:
            return data
        if self.asked is not None:
            self._rest = data
            return b""
        at = self._passable(data)
        self._rest = data[at:]
        return data if at == len(data) else data[:at]

    def release(self) -> bytes:
        """What was held back, as far as it may pass now."""
        self.asked = None
        self._left = _HEAD.size + _SIZE
        return self.feed(b"")

    def release_all(self) -> bytes:
        """Watch no more: all that was held back."""
        self.asked, self.over = None, True
        return self.feed(b"")

    def _passable(self, data: bytes) -> int:
        """How many bytes pass before the next hash."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                at += step
                continue
            if end - at < _HEAD.size:
                break
            command, size = _HEAD.unpack_from(data, at)
            if command in (_GRAPH_COMPUTE, _GRAPH_RECOMPUTE):
                self.over = True
                return end
            if command != _SET_TENSOR_HASH or size != _SIZE:
                self._left = _HEAD.size + size
                continue
            if end - at < _HEAD.size + _SIZE:
                break
            self.asked = _asked(data[at + _HEAD.size : at + _HEAD.size + _SIZE])
            break
        return at


def _asked(payload: bytes) -> HeldHash:
    kind, *shape = _TENSOR.unpack_from(payload)
    offset, hash = _PLACE.unpack_from(payload, _PLACE_AT)
    name = payload[_NAME].split(b"\0", 1)[0].decode("utf-8", "replace")
    return HeldHash(name, kind, tuple(shape), offset, f"{hash:016x}")
