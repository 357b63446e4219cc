"""Counts the values of a JSON text before it is decoded: two bytes can become an object of eighty.

Pure, and fed piece by piece as a body arrives: a body of millions of empty lists is refused early, and no
piece takes long.
"""

from __future__ import annotations

MOST_CONTAINERS = 20_000
"""Maximum objects and arrays in a body: decoding them takes about 10 ms, checking twice that. A request of a
thousand messages with a hundred tools has a quarter of them."""
MOST_VALUES = 300_000
"""Maximum values in a body, such as the numbers of a tokenized prompt: decoding them takes about 20 ms."""
MOST_KEYS = 60_000
"""Maximum names in objects: each is hashed when it is decoded, and again when it is checked."""
_CONTAINER_BYTES = 200
_VALUE_BYTES = 60


class TooManyValues(Exception):
    """The text has more objects, arrays, names or values than a request may have; the message says which."""


class JsonBounds:
    """Counts containers and values outside of strings. If the text is not JSON, the counts are arbitrary."""

    def __init__(self, containers: int = MOST_CONTAINERS, values: int = MOST_VALUES) -> None:
        """``containers``, ``values``: the limits."""
        self._max_containers = containers
        self._max_values = values
        self.cost = 0
        """Approximate bytes that the decoded values take besides their text."""
        self._containers = 0
        self._commas = 0
        self._keys = 0
        self._in_string = False
        self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Count the next piece.

        Raises:
            TooManyValues: a limit is exceeded.
        """
        outside = self._outside(piece)
        self._containers += outside.count(b"[") + outside.count(b"{")
        self._commas += outside.count(b",")
        self._keys += outside.count(b":")
        self.cost = self._containers * _CONTAINER_BYTES + self._commas * _VALUE_BYTES
        if self._keys > MOST_KEYS:
            raise TooManyValues(f"the JSON body has more than {MOST_KEYS} names in its objects")
        if self._containers > self._max_containers:
            raise TooManyValues(f"the JSON body has more than {self._max_containers} objects and arrays")
        if self._commas + self._containers > self._max_values:
            raise TooManyValues(f"the JSON body has more than {self._max_values} values")

    def _outside(self, piece: bytes) -> bytes:
        """Return the bytes of ``piece`` that are outside of strings."""
        if self._escaped:
            piece, self._escaped = piece[1:], not piece
        if b"\\" in piece:
            ending = len(piece) - len(piece.rstrip(b"\\"))
            self._escaped = ending % 2 == 1
            # Pairs first, so that a backslash that remains before a quote escapes it.
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        first, self._in_string = int(self._in_string), self._in_string ^ (len(parts) % 2 == 0)
        return b"".join(parts[first::2])
