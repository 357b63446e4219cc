"""Reads JSON as Go does where it is not quite UTF-8: U+FFFD stands for half a character and for a wrong byte.

A program that cuts a text by UTF-16 units cuts an emoji in two, and its JSON says so (``"\\ud83d"``).
"""

from __future__ import annotations

import asyncio
import re

_SURROGATES = re.compile(
    rb"(?<!\\)((?:\\\\)*+)"
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|[c-fC-F][0-9a-fA-F]{2})"
)
"""In JSON, the escape of half a character; with its other half, when that follows, as the second group."""
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")
_CUT = re.compile(rb"[^\\]{6}(?=[^\\\x80-\xbf])")
"""No character and no escape goes on behind it."""
_PIECE = 128 * 1024
_MOST = 10_000
"""Escapes and wrong bytes of a body."""


class TooMuchToRepair(Exception):
    """More is wrong than a program that means well sends."""


async def repaired(raw: bytes | bytearray) -> bytes | bytearray:
    """``raw`` with U+FFFD in place of what is no character. Others have their turn meanwhile.

    Raises:
        TooMuchToRepair: there is more than a few thousand of it.
    """
    parts: list[bytes | bytearray] = []
    changed = False
    begin, left = 0, _MOST
    while begin < len(raw):
        end = _end(raw, begin)
        piece = raw[begin:end]
        left -= piece.count(b"\\u")
        if not piece.isascii() and left >= 0:
            text = piece.decode("utf-8", "surrogateescape")
            # Before they are replaced: each costs more than all else.
            left -= len(piece) - len(piece.decode("utf-8", "ignore").encode())
            piece = _NOT_UTF8.sub("\ufffd", text).encode() if left >= 0 else piece
            changed = True
        if left < 0:
            raise TooMuchToRepair
        if b"\\u" in piece:
            changed = True
            piece = _SURROGATES.sub(lambda met: met[0] if met[2] else met[1] + rb"\ufffd", piece)
        parts.append(piece)
        begin = end
        await asyncio.sleep(0)
    # Joining copies, which takes long for a large body.
    return b"".join(parts) if changed else raw


def _end(raw: bytes | bytearray, begin: int) -> int:
    """Where the piece ends that begins there.

    Raises:
        TooMuchToRepair: all that follows is escapes or wrong bytes.
    """
    if begin + _PIECE >= len(raw):
        return len(raw)
    met = _CUT.search(raw, begin + _PIECE, begin + 2 * _PIECE)
    if met is None:
        raise TooMuchToRepair
    return met.end()
