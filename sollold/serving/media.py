"""Keeps images and audio of a request out of its decoded JSON.

They are up to 128 MiB of base64. Decoding, checking, copying and encoding it would each block the loop for a
tenth of a second and need as much memory again. So the middle of each stays in the received bytes, replaced
by a mark (`sollold.api.http.media_cut`), and is put back into the bytes that are sent to an engine.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
from io import BytesIO

from sollold.cluster.net.pieces import pieces_of

_PREFIX = base64.b64encode(os.urandom(12))
_KEY = os.urandom(32)
_MARK = re.compile(re.escape(_PREFIX) + rb"[A-Za-z0-9+/]{28}")
_MIN_MARKED = 4096
"""Strings shorter than this, in characters, contain no mark: the edges of cut content stay beside it."""


class Media:
    """The content cut out of one request, by its marks.

    A mark is base64 in whole groups of four, so that the text around it is still valid base64. It is a keyed
    digest of the content, so that equal requests have equal marks, and others cannot forge one.
    """

    def __init__(self) -> None:
        self._cut: dict[bytes, memoryview] = {}

    async def add(self, content: memoryview) -> bytes:
        """Store ``content`` and return its mark."""
        digest = hashlib.blake2b(key=_KEY, digest_size=21)
        for piece in pieces_of(content):
            digest.update(piece)
            await asyncio.sleep(0)
        mark = _PREFIX + base64.b64encode(digest.digest())
        self._cut[mark] = content
        return mark

    def marks_in(self, text: str) -> list[str]:
        """The marks in a string."""
        if len(text) < _MIN_MARKED:
            return []
        found = _MARK.findall(text.encode("utf-8", "replace")) if _PREFIX.decode() in text else ()
        return [mark.decode() for mark in found if mark in self._cut]

    def size(self, mark: str) -> int:
        """Size of the content that a mark replaces, in bytes."""
        return self._cut[mark.encode()].nbytes

    def head(self, text: str, limit: int) -> str:
        """The first ``limit`` characters of a string, with the content restored."""
        head = text[: 2 * limit].encode("utf-8", "replace")
        match = _MARK.search(head) if len(head) >= _MIN_MARKED else None
        content = self._cut.get(match[0]) if match is not None else None
        if match is None or content is None:
            return text[:limit]
        restored = head[: match.start()] + bytes(content[:limit]) + head[match.end() :]
        return restored[:limit].decode("utf-8", "replace")

    def restored(self, text: str) -> str:
        """The string with all cut content restored."""
        for mark in self.marks_in(text):
            text = text.replace(mark, str(self._cut[mark.encode()], "ascii"))
        return text

    async def put_back(self, encoded: bytes) -> bytes:
        """Return encoded JSON with all cut content restored. Yields to the loop in between."""
        # BytesIO grows in place and returns its content without a copy.
        restored, start = BytesIO(), 0
        for match in _MARK.finditer(encoded):
            content = self._cut.get(match[0])
            if content is None:
                continue
            restored.write(encoded[start : match.start()])
            for piece in pieces_of(content):
                restored.write(piece)
                await asyncio.sleep(0)
            start = match.end()
        restored.write(encoded[start:])
        return restored.getvalue()
