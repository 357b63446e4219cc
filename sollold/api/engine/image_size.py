"""Reads the size of an image from its header. Pure.

A file of a few bytes can announce billions of pixels, for which an engine allocates memory before it reads
further.
"""

from __future__ import annotations

import re
import struct

MOST_PIXELS = 120_000_000
"""12,000 by 10,000, which takes an engine 360 MB: more than cameras usually produce."""
HEADS = (3 << 10, 96 << 10, 1 << 20)
"""Lengths of a file's beginning to search for the size, in bytes: a JPEG may have a preview before it."""

_NETPBM = re.compile(rb"P[56](?:\s|#[^\n]*\n)+(\d{1,10})(?:\s|#[^\n]*\n)+(\d{1,10})")
_RADIANCE = re.compile(rb"[-+]Y (\d{1,10}) \+X (\d{1,10})")
_TGA_KINDS = ((1, (1, 9)), (0, (2, 3, 10, 11)))
"""Whether there is a colour map, and the image types that exist in that case."""


def pixels(head: bytes, *, whole: bool = True) -> int | None:
    """Return the pixel count of a file that begins with ``head``, in any format that an engine reads.

    ``whole``: ``head`` is the whole file. 0: the format is unknown; None: the size comes after ``head``.
    """
    try:
        width, height = _size(head, whole)
    except (struct.error, IndexError):
        return 0
    except _NotYet:
        return None
    return abs(width) * abs(height)


class _NotYet(Exception):
    """The size comes later."""


def _size(head: bytes, whole: bool) -> tuple[int, int]:
    if head.startswith(b"\x89PNG"):
        # Apple's PNGs begin with a chunk of their own.
        start = head.find(b"IHDR", 8, 256)
        return _unpack(">II", head, start + 4) if start > 0 else (0, 0)
    if head.startswith(b"\xff\xd8"):
        return _jpeg(head, whole)
    if head.startswith(b"GIF8"):
        return _unpack("<HH", head, 6)
    if head.startswith(b"BM"):
        return _unpack("<HH", head, 18) if head[14] == 12 else _unpack("<ii", head, 18)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    if head.startswith(b"8BPS"):
        return _unpack(">II", head, 14)
    if head.startswith(b"\x53\x80\xf6\x34"):
        return _unpack(">HH", head, 92)
    if head.startswith((b"P5", b"P6", b"#?RADIANCE", b"#?RGBE")):
        match = _NETPBM.match(head) if head.startswith(b"P") else _RADIANCE.search(head)
        return (int(match[1]), int(match[2])) if match else (0, 0)
    # TGA has no magic number: accept a file whose header is possible.
    if (head[1], head[2]) in {(mapped, kind) for mapped, kinds in _TGA_KINDS for kind in kinds}:
        return _unpack("<HH", head, 12)
    return 0, 0


def _unpack(form: str, head: bytes, offset: int) -> tuple[int, int]:
    first, second = struct.unpack_from(form, head, offset)
    return first, second


def _jpeg(head: bytes, whole: bool) -> tuple[int, int]:
    offset = 2
    while offset + 9 <= len(head):
        if head[offset] != 0xFF:
            offset += 1
            continue
        kind = head[offset + 1]
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD9:
            offset += 1 if kind == 0xFF else 2
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return _unpack(">HH", head, offset + 5)
        else:
            offset += 2 + max(2, int.from_bytes(head[offset + 2 : offset + 4], "big"))
    if whole:
        return 0, 0
    raise _NotYet


def _webp(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        packed = int.from_bytes(head[21:25], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    width, height = _unpack("<HH", head, 26)
    return width & 0x3FFF, height & 0x3FFF
