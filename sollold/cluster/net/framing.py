"""Framing of messages on a byte stream: four bytes of length, big-endian, then the message."""

from __future__ import annotations

import struct

_LENGTH = struct.Struct(">I")
HEADER = _LENGTH.size


class FrameError(Exception):
    """The other side announced a message above the size limit."""


def frame(data: bytes) -> bytes:
    """Return ``data`` framed as one message."""
    return _LENGTH.pack(len(data)) + data


class Unframer:
    """Splits received bytes into messages."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def take_message(self) -> bytes | None:
        """Return the next complete message; None if there is none yet.

        Raises:
            FrameError: the announced message is longer than the limit.
        """
        if len(self._buffer) < HEADER:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._limit:
            raise FrameError(f"a message of {length} bytes; the limit is {self._limit}")
        if len(self._buffer) < HEADER + length:
            return None
        data = bytes(self._buffer[HEADER : HEADER + length])
        del self._buffer[: HEADER + length]
        return data

    def rest(self) -> bytes:
        """Remove and return the bytes after the last message taken."""
        left = bytes(self._buffer)
        self._buffer.clear()
        return left
