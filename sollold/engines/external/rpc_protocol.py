"""Client side of llama.cpp's RPC handshake: version, device count, device memory. Sans-I/O.

A request is a command byte, an eight-byte payload size (little-endian) and the payload; a response is a size
and a payload.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from sollold.facts import dataclass

_GET_DEVICE_MEMORY = 11
_HELLO = 14
_DEVICE_COUNT = 15
_SIZE = struct.Struct("<Q")
_INDEX = struct.Struct("<I")
_MEMORY = struct.Struct("<QQ")
_CAPABILITIES = bytes(24)
"""All zero: plain TCP."""
MOST_DEVICES = 64
_MAX_BYTES = 4096
"""Largest accepted response, in bytes: real ones have a few dozen."""
_MAX_MEMORY_BYTES = 1 << 60


class NotAWorker(Exception):
    """The peer does not speak this protocol; the message says what gave it away."""


class Version(NamedTuple):
    """Protocol version. Workers and heads are compatible if major and minor are equal."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    def mixes(self, other: Version) -> bool:
        """Return whether the two versions are compatible."""
        return (self.major, self.minor) == (other.major, other.minor)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device in bytes, as the worker reports it."""

    free: int
    total: int


class Handshake:
    """One handshake. Send `begin`, then pass received bytes to `feed` and send its result, until `done`.

    Attributes:
        version: the worker's protocol version, once known.
        memories: memory of the worker's devices, in order.
    """

    def __init__(self, local: Version | None = None) -> None:
        """``local``: our version; stop once the worker's turns out to be incompatible. None: never stop."""
        self._local = local
        self._buffer = b""
        self._count = -1
        self.version: Version | None = None
        self.memories: list[DeviceMemory] = []
        self.done = False

    def begin(self) -> bytes:
        """Return the first request."""
        return _request(_HELLO, _CAPABILITIES)

    def feed(self, data: bytes) -> bytes:
        """Return the next request after receiving ``data``; empty until a response is complete and if done.

        Raises:
            NotAWorker: the data is not a worker's response.
        """
        self._buffer += data
        request = b""
        while not self.done and (response := self._take_response()) is not None:
            request = self._handle(response)
        return request

    def _take_response(self) -> bytes | None:
        if len(self._buffer) < _SIZE.size:
            return None
        (size,) = _SIZE.unpack_from(self._buffer)
        if size > _MAX_BYTES:
            raise NotAWorker("it is not a llama.cpp RPC worker")
        end = _SIZE.size + size
        if len(self._buffer) < end:
            return None
        response, self._buffer = self._buffer[_SIZE.size : end], self._buffer[end:]
        return response

    def _handle(self, response: bytes) -> bytes:
        if self.version is None:
            if len(response) < 3:
                raise NotAWorker("its handshake is not that of a llama.cpp RPC worker")
            self.version = Version(response[0], response[1], response[2])
            if self._local is not None and not self.version.mixes(self._local):
                self.done = True
                return b""
            return _request(_DEVICE_COUNT)
        if self._count < 0:
            if len(response) != _INDEX.size:
                raise NotAWorker("it does not report its number of devices")
            (self._count,) = _INDEX.unpack(response)
            if self._count > MOST_DEVICES:
                raise NotAWorker(f"it claims to have {self._count} devices")
        else:
            if len(response) != _MEMORY.size:
                raise NotAWorker("it does not report the memory of a device")
            free, total = _MEMORY.unpack(response)
            if total > _MAX_MEMORY_BYTES:
                raise NotAWorker(f"it claims to have {total} bytes on one device")
            self.memories.append(DeviceMemory(min(free, total), total))
        if len(self.memories) == self._count:
            self.done = True
            return b""
        return _request(_GET_DEVICE_MEMORY, _INDEX.pack(len(self.memories)))


def _request(command: int, payload: bytes = b"") -> bytes:
    return bytes([command]) + _SIZE.pack(len(payload)) + payload
