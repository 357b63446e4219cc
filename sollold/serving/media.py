"""Images and sound of a request, kept out of the values that its text is decoded to.

They are base64, up to 128 MiB of it. Decoding, checking, copying and encoding that would each stop the loop
for a tenth of a second and take its size again. So the middle of each stays in the bytes that came, a mark
stands for it (`sollold.api.http.media_cut`), and it is put back into the bytes that an engine is sent.
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
_LONGEST_SHORT = 4096
"""Characters of a text that has no mark: what is beside a mark stays with it."""


class Media:
    """What was cut out of one request, by its marks.

    A mark is base64 of whole groups of four, so that what stood around it is still base64. It is made of what
    it stands for, so that the same request has the same marks; nobody else can make one.
    """

    def __init__(self) -> None:
        self._cut: dict[bytes, memoryview] = {}

    async def add(self, content: memoryview) -> bytes:
        """The mark for ``content``."""
        digest = hashlib.blake2b(key=_KEY, digest_size=21)
        for piece in pieces_of(content):
            digest.update(piece)
            await asyncio.sleep(0)
        mark = _PREFIX + base64.b64encode(digest.digest())
        self._cut[mark] = content
        return mark

    def marks_in(self, text: str) -> list[str]:
        """The marks in a text."""
        if len(text) < _LONGEST_SHORT:
            return []
        found = _MARK.findall(text.encode("utf-8", "replace")) if _PREFIX.decode() in text else ()
        return [mark.decode() for mark in found if mark in self._cut]

    def size(self, mark: str) -> int:
        """Bytes that a mark stands for."""
        return self._cut[mark.encode()].nbytes

    def head(self, text: str, most: int) -> str:
        """The first ``most`` characters of a text, of which some may have been cut out."""
        head = text[: 2 * most].encode("utf-8", "replace")
        met = _MARK.search(head) if len(head) >= _LONGEST_SHORT else None
        content = self._cut.get(met[0]) if met is not None else None
        if met is None or content is None:
            return text[:most]
        whole = head[: met.start()] + bytes(content[:most]) + head[met.end() :]
        return whole[:most].decode("utf-8", "replace")

    def restored(self, text: str) -> str:
        """A text with all that was cut out of it."""
        for mark in self.marks_in(text):
            text = text.replace(mark, str(self._cut[mark.encode()], "ascii"))
        return text

    async def put_back(self, encoded: bytes) -> bytes:
        """JSON with all that was cut out. Others have their turn meanwhile."""
        # Grows in place and gives what it holds without a copy.
        whole, at = BytesIO(), 0
        for met in _MARK.finditer(encoded):
            content = self._cut.get(met[0])
            if content is None:
                continue
            whole.write(encoded[at : met.start()])
            for piece in pieces_of(content):
                whole.write(piece)
                await asyncio.sleep(0)
            at = met.end()
        whole.write(encoded[at:])
        return whole.getvalue()
