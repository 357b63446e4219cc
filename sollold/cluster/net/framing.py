"""Messages on a byte stream: four bytes of length, big-endian, then that many bytes."""

from __future__ import annotations

import struct

_LENGTH = struct.Struct(">I")
HEADER = _LENGTH.size


class FrameError(Exception):
    """The other side announced a message longer than this stream carries."""


def frame(data: bytes) -> bytes:
    """``data`` as one message."""
    return _LENGTH.pack(len(data)) + data


class Unframer:
    """Takes bytes as they come, gives messages. Holds at most one message and what came with it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> None:
        """More bytes."""
        self._held += data

    def take_message(self) -> bytes | None:
        """The next whole message; None while there is none.

        Raises:
            FrameError: the message would be longer than the limit.
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
        """What came after the last message taken; it is not held any more."""
        left = bytes(self._held)
        self._held.clear()
        return left
