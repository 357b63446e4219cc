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
_PIECE_BYTES = 128 * 1024
_MAX_ERRORS = 10_000
"""Maximum escapes and invalid bytes in a body that needs repair."""


class TooMuchToRepair(Exception):
    """There are more errors than a program that cuts strings produces."""


async def repaired(raw: bytes | bytearray) -> bytes | bytearray:
    """Return ``raw`` with U+FFFD in place of invalid bytes and halves of characters. Yields to the loop.

    Raises:
        TooMuchToRepair: there are more than a few thousand escapes (valid ones too) and invalid bytes.
    """
    parts: list[bytes | bytearray] = []
    changed = False
    start, budget = 0, _MAX_ERRORS
    while start < len(raw):
        end = _end(raw, start)
        piece = raw[start:end]
        budget -= piece.count(b"\\u")
        if not piece.isascii() and budget >= 0:
            text = piece.decode("utf-8", "surrogateescape")
            # Counted before they are replaced, which is the most expensive part.
            budget -= len(piece) - len(piece.decode("utf-8", "ignore").encode())
            piece = _NOT_UTF8.sub("\ufffd", text).encode() if budget >= 0 else piece
            changed = True
        if budget < 0:
            raise TooMuchToRepair
        if b"\\u" in piece:
            changed = True
            piece = _SURROGATES.sub(lambda match: match[0] if match[2] else match[1] + rb"\ufffd", piece)
        parts.append(piece)
        start = end
        await asyncio.sleep(0)
    # Joining copies, which takes long for a large body.
    return b"".join(parts) if changed else raw


def _end(raw: bytes | bytearray, start: int) -> int:
    """Return the end of the piece that starts at ``start``.

    Raises:
        TooMuchToRepair: there is no safe end, as in a long run of escapes or invalid bytes.
    """
    if start + _PIECE_BYTES >= len(raw):
        return len(raw)
    match = _CUT.search(raw, start + _PIECE_BYTES, start + 2 * _PIECE_BYTES)
    if match is None:
        raise TooMuchToRepair
    return match.end()
