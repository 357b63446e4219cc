"""Cuts images and audio out of a body before it is decoded; see `sollold.serving.media`."""

from __future__ import annotations

import asyncio
import base64
import codecs
import string
from typing import Any

from sollold.cluster.net.pieces import pieces_of
from sollold.errors import bad_request
from sollold.serving.media import Media

LONGEST_TEXT = 8 << 20
"""Maximum bytes of a body without its images and audio: more than any model reads."""
_BLOCK_BYTES = 64 * 1024
SHORTEST_CUT = 4 * _BLOCK_BYTES
"""Minimum bytes of base64 that are cut out; less is decoded quickly."""
_EDGE_BYTES = 8 * 1024
"""Bytes that stay at either end, for code that examines the type."""
_LETTERS = (string.ascii_letters + string.digits + "+/=-_\\").encode()
"""Characters of base64, and of the escaped slash (``\\/``) that some programs write."""
_BACKSLASH = ord("\\")
_FIELDS = frozenset(("images", "image_url", "url", "data", "file_data", "video_url"))
"""Fields that hold images or audio, in any dialect."""
_FILE = "file_data"
"""The field that may hold plain text in base64 instead, which is read here."""
_FILE_HEAD_CHARACTERS = 4096


async def cut_media(raw: bytearray) -> tuple[bytes | bytearray, Media | None]:
    """Return ``raw`` with marks in place of its media, and the media; None if there are none.

    ``raw`` has at least `SHORTEST_CUT` bytes.

    Raises:
        Refusal: BAD_REQUEST with status 413: the rest is longer than `LONGEST_TEXT`.
    """
    media, output, copied = Media(), bytearray(), 0
    view, position = memoryview(raw), 0
    while position + _BLOCK_BYTES <= len(raw):
        await asyncio.sleep(0)
        if not _is_base64(raw, position):
            position += _BLOCK_BYTES
            _check_size(len(output) + position - copied)
            continue
        start, end = _run_start(raw, position, copied), position + _BLOCK_BYTES
        while end + _BLOCK_BYTES <= len(raw) and _is_base64(raw, end):
            end += _BLOCK_BYTES
            await asyncio.sleep(0)
        end += _run_length(raw[end : end + _BLOCK_BYTES])
        if raw[end - 1] == _BACKSLASH:
            end -= 1  # it belongs to what follows
        content = await _unescape(view[start:end]) if end - start >= SHORTEST_CUT else None
        if content is not None:
            output += view[copied:start]
            middle = (content.nbytes - 2 * _EDGE_BYTES) // 4 * 4
            output += content[:_EDGE_BYTES]
            output += await media.add(content[_EDGE_BYTES : _EDGE_BYTES + middle])
            output += content[_EDGE_BYTES + middle :]
            copied = end
        position = end
    _check_size(len(output) + len(raw) - copied)
    if not copied:
        return raw, None
    output += view[copied:]
    return output, media


async def restore_texts(value: Any, media: Media) -> Any:
    """Restore strings of ``value`` that are read here, in place; images, audio and other files stay cut out.

    Raises:
        Refusal: BAD_REQUEST with status 413: these strings are longer than `LONGEST_TEXT`.
    """
    visited, restored = 0, 0
    waiting: list[tuple[Any, str]] = [(value, "")]
    while waiting:
        holder, name = waiting.pop()
        for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            field = key if isinstance(key, str) else name
            visited += 1
            if not visited % 4096:
                await asyncio.sleep(0)
            if isinstance(item, dict | list):
                waiting.append((item, field))
            elif isinstance(item, str) and _is_read(field, item, media) and (marks := media.marks_in(item)):
                restored += sum(map(media.size, marks))
                _check_size(restored)
                holder[key] = media.restored(item)
    return value


def _is_read(field: str, item: str, media: Media) -> bool:
    """Whether the text of a field is read here, not only passed on."""
    name = field.lower()
    return name not in _FIELDS or (name == _FILE and _is_plain_text(media.head(item, _FILE_HEAD_CHARACTERS)))


def _is_plain_text(head: str) -> bool:
    """Whether base64, bare or as a ``data:`` URL, begins with plain text."""
    encoded = head.partition(",")[2] if head[:5].lower() == "data:" else head
    try:
        decoded = base64.b64decode(encoded[: len(encoded) // 4 * 4])
        # The last character may be cut off.
        text = codecs.getincrementaldecoder("utf-8")().decode(decoded)
    except ValueError:
        return False
    return not text.startswith("%PDF") and "\0" not in text


def _check_size(size: int) -> None:
    if size > LONGEST_TEXT:
        raise bad_request(
            f"the text in the body is longer than {LONGEST_TEXT} bytes; only images and audio in base64 "
            "may be longer",
            status=413,
        )


def _is_base64(raw: bytearray, position: int) -> bool:
    return not raw[position : position + _BLOCK_BYTES].translate(None, _LETTERS)


def _run_start(raw: bytearray, position: int, copied: int) -> int:
    """Return the start of the run of base64 that includes ``position``; not before ``copied``."""
    preceding = raw[max(copied, position - _BLOCK_BYTES) : position]
    return position - (len(preceding) - len(preceding.rstrip(_LETTERS)))


def _run_length(block: bytearray) -> int:
    return len(block) - len(block.lstrip(_LETTERS))


async def _unescape(run: memoryview) -> memoryview | None:
    """Return a run without its escaped slashes; None if it has other escapes, so that it is text."""
    if not await _has_escapes(run):
        return run
    output, position = bytearray(), 0
    while position < run.nbytes:
        end = min(position + _BLOCK_BYTES, run.nbytes)
        if run[end - 1] == _BACKSLASH:
            end += 1
        piece = bytes(run[position:end]).replace(b"\\/", b"/")
        if b"\\" in piece:
            return None
        output += piece
        position = end
        await asyncio.sleep(0)
    return memoryview(output)


async def _has_escapes(run: memoryview) -> bool:
    for piece in pieces_of(run):
        if b"\\" in bytes(piece):
            return True
        await asyncio.sleep(0)
    return False
