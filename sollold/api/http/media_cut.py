"""Cuts images and audio out of a body before it is decoded; see `sollold.serving.media`."""

from __future__ import annotations

import asyncio
import string
from typing import Any

from sollold.cluster.net.pieces import pieces_of
from sollold.errors import Fault, Refusal
from sollold.serving.media import Media

LONGEST_TEXT = 8 << 20
"""Maximum bytes of a body without its images and audio: more than any model reads."""
_BLOCK = 64 * 1024
SHORTEST_CUT = 4 * _BLOCK
"""Minimum bytes of base64 that are cut out; less is decoded quickly."""
_EDGE = 8 * 1024
"""Bytes that stay at either end, for code that looks at the type."""
_LETTERS = (string.ascii_letters + string.digits + "+/=-_\\").encode()
"""Characters of base64, and of the escaped slash (``\\/``) that some programs write."""
_BACKSLASH = ord("\\")
_HELD_BY = frozenset(("images", "image_url", "url", "data", "file_data", "video_url"))
"""Fields that hold images or audio, in any dialect."""


async def cut_media(raw: bytearray) -> tuple[bytes | bytearray, Media | None]:
    """Return ``raw`` with marks in place of its media, and the media; None if there are none.

    ``raw`` has at least `SHORTEST_CUT` bytes.

    Raises:
        Refusal: BAD_REQUEST with status 413: the rest is longer than `LONGEST_TEXT`.
    """
    media, kept, left = Media(), bytearray(), 0
    view, at = memoryview(raw), 0
    while at + _BLOCK <= len(raw):
        await asyncio.sleep(0)
        if not _is_base64(raw, at):
            at += _BLOCK
            _bound(len(kept) + at - left)
            continue
        begin, end = _begin(raw, at, left), at + _BLOCK
        while end + _BLOCK <= len(raw) and _is_base64(raw, end):
            end += _BLOCK
            await asyncio.sleep(0)
        end += _first_other(raw[end : end + _BLOCK])
        if raw[end - 1] == _BACKSLASH:
            end -= 1  # it belongs to what follows
        content = await _plain(view[begin:end]) if end - begin >= SHORTEST_CUT else None
        if content is not None:
            kept += view[left:begin]
            middle = (content.nbytes - 2 * _EDGE) // 4 * 4
            kept += content[:_EDGE]
            kept += await media.add(content[_EDGE : _EDGE + middle])
            kept += content[_EDGE + middle :]
            left = end
        at = end
    _bound(len(kept) + len(raw) - left)
    if not left:
        return raw, None
    kept += view[left:]
    return kept, media


async def restore_texts(value: Any, media: Media) -> Any:
    """Restore other strings that were cut out of ``value``, in place; images and audio stay cut out.

    Raises:
        Refusal: BAD_REQUEST with status 413: these strings are longer than `LONGEST_TEXT`.
    """
    walked, restored = 0, 0
    waiting: list[tuple[Any, str]] = [(value, "")]
    while waiting:
        holder, name = waiting.pop()
        for key, one in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            held_by = key if isinstance(key, str) else name
            walked += 1
            if not walked % 4096:
                await asyncio.sleep(0)
            if isinstance(one, dict | list):
                waiting.append((one, held_by))
            elif isinstance(one, str) and held_by.lower() not in _HELD_BY and (marks := media.marks_in(one)):
                restored += sum(map(media.size, marks))
                _bound(restored)
                holder[key] = media.restored(one)
    return value


def _bound(size: int) -> None:
    if size > LONGEST_TEXT:
        raise Refusal(
            Fault.BAD_REQUEST,
            f"the text in the body is longer than {LONGEST_TEXT} bytes; only images and audio in base64 "
            "may be longer",
            status=413,
        )


def _is_base64(raw: bytearray, at: int) -> bool:
    return not raw[at : at + _BLOCK].translate(None, _LETTERS)


def _begin(raw: bytearray, at: int, left: int) -> int:
    """Return where the run of base64 that continues at ``at`` begins; not before ``left``."""
    before = raw[max(left, at - _BLOCK) : at]
    return at - (len(before) - len(before.rstrip(_LETTERS)))


def _first_other(block: bytearray) -> int:
    return len(block) - len(block.lstrip(_LETTERS))


async def _plain(run: memoryview) -> memoryview | None:
    """Return a run without its escaped slashes; None if it has other escapes, so that it is text."""
    if not await _has_escapes(run):
        return run
    output, at = bytearray(), 0
    while at < run.nbytes:
        end = min(at + _BLOCK, run.nbytes)
        if run[end - 1] == _BACKSLASH:
            end += 1
        piece = bytes(run[at:end]).replace(b"\\/", b"/")
        if b"\\" in piece:
            return None
        output += piece
        at = end
        await asyncio.sleep(0)
    return memoryview(output)


async def _has_escapes(run: memoryview) -> bool:
    for piece in pieces_of(run):
        if b"\\" in bytes(piece):
            return True
        await asyncio.sleep(0)
    return False
