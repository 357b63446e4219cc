"""Repairs JSON that is not quite UTF-8, as Go does: U+FFFD replaces half a character and an invalid byte.

A program that cuts a string by UTF-16 units may cut an emoji in two, as its JSON shows (``"\\ud83d"``).
"""

from __future__ import annotations

import asyncio
import re

_SURROGATES = re.compile(
    rb"(?<!\\)((?:\\\\)*+)"
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|[c-fC-F][0-9a-fA-F]{2})"
)
"""JSON's escape of half a character; the second group is its other half, if that follows."""
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")
_CUT = re.compile(rb"[^\\]{6}(?=[^\\\x80-\xbf])")
"""A position at which no character and no escape continues."""
_PIECE = 128 * 1024
_MOST_ERRORS = 10_000
"""Maximum escapes and invalid bytes in a body that needs repair."""


class TooMuchToRepair(Exception):
    """There are more errors than a well-meaning program produces."""


async def repaired(raw: bytes | bytearray) -> bytes | bytearray:
    """Return ``raw`` with U+FFFD in place of what is not a character. Yields to the loop in between.

    Raises:
        TooMuchToRepair: there are more than a few thousand escapes (valid ones too) and invalid bytes.
    """
    parts: list[bytes | bytearray] = []
    changed = False
    begin, left = 0, _MOST_ERRORS
    while begin < len(raw):
        end = _end(raw, begin)
        piece = raw[begin:end]
        left -= piece.count(b"\\u")
        if not piece.isascii() and left >= 0:
            text = piece.decode("utf-8", "surrogateescape")
            # Counted before they are replaced, which is the most expensive part.
            left -= len(piece) - len(piece.decode("utf-8", "ignore").encode())
            piece = _NOT_UTF8.sub("\ufffd", text).encode() if left >= 0 else piece
            changed = True
        if left < 0:
            raise TooMuchToRepair
        if b"\\u" in piece:
            changed = True
            piece = _SURROGATES.sub(lambda match: match[0] if match[2] else match[1] + rb"\ufffd", piece)
        parts.append(piece)
        begin = end
        await asyncio.sleep(0)
    # Joining copies, which takes long for a large body.
    return b"".join(parts) if changed else raw


def _end(raw: bytes | bytearray, begin: int) -> int:
    """Return the end of the piece that starts at ``begin``.

    Raises:
        TooMuchToRepair: there is no safe end, as in a long run of escapes or invalid bytes.
    """
    if begin + _PIECE >= len(raw):
        return len(raw)
    match = _CUT.search(raw, begin + _PIECE, begin + 2 * _PIECE)
    if match is None:
        raise TooMuchToRepair
    return match.end()
