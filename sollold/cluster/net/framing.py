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
        self._held = bytearray()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._held += data

    def take_message(self) -> bytes | None:
        """Return the next complete message; None if there is none yet.

        Raises:
            FrameError: the announced message is longer than the limit.
        """
        if len(self._held) < HEADER:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        if length > self._limit:
            raise FrameError(f"a message of {length} bytes; the limit is {self._limit}")
        if len(self._held) < HEADER + length:
            return None
        data = bytes(self._held[HEADER : HEADER + length])
        del self._held[: HEADER + length]
        return data

    def rest(self) -> bytes:
        """Remove and return the bytes after the last message taken."""
        left = bytes(self._held)
        self._held.clear()
        return left
