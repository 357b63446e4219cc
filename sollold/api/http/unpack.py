"""Unpacks request bodies with ``Content-Encoding: gzip`` or ``deflate`` (RFC 9110, 8.4.1), a piece at a time.

A packed body can become a thousand times as long. Unpacked as one, it would hold up everybody else.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator

from aiohttp import web

from sollold.errors import Fault, Refusal

_PACKED = 4096
"""Bytes that are unpacked at once: they may be hundreds of streams, and what follows each is copied."""
_PIECE = 256 * 1024
_ZLIB, _RAW, _GZIP = 15, -15, 31
"""Forms of zlib's stream, as its ``wbits``."""


async def unpacked(request: web.Request) -> AsyncIterator[bytes]:
    """The pieces of a body as they arrive, unpacked.

    Raises:
        Refusal: BAD_REQUEST, with status 415 for an encoding that is not known, when it is not packed as it
            says, or ends early.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        while piece := await request.content.readany():
            yield piece
        return
    unpacker = Unpacker(encoding)
    while packed := await request.content.readany():
        for begin in range(0, len(packed), _PACKED):
            for piece in unpacker.feed(packed[begin : begin + _PACKED]):
                yield piece
                # Others have their turn.
                await asyncio.sleep(0)
    unpacker.feed_eof()


class Unpacker:
    """Unpacks one body, piece by piece: it is never whole in memory for that."""

    def __init__(self, encoding: str) -> None:
        """``encoding``: of its header, in lower case.

        Raises:
            Refusal: BAD_REQUEST with status 415: it is none of those that are known.
        """
        if encoding not in ("gzip", "x-gzip", "deflate"):
            message = f"Content-Encoding {encoding[:40]} is not known; send gzip or nothing"
            raise Refusal(Fault.BAD_REQUEST, message, status=415)
        self._encoding = encoding
        self._stream: zlib._Decompress | None = None

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """What ``packed`` becomes, in pieces of about 256 KiB.

        Raises:
            Refusal: BAD_REQUEST.
        """
        made, more = bytearray(), False
        while packed or more:
            if self._stream is None:
                self._stream = zlib.decompressobj(self._form(packed))
            try:
                piece = self._stream.decompress(packed, _PIECE)
            except zlib.error as error:
                raise self._refusal(str(error)) from None
            made += piece
            # All of ``packed`` may be taken, and there is more to come of it.
            packed, more = self._stream.unconsumed_tail, len(piece) == _PIECE
            if self._stream.eof:
                # Another stream may follow in the same body.
                packed, more, self._stream = self._stream.unused_data, False, None
            if len(made) >= _PIECE or (made and not packed and not more):
                yield bytes(made)
                made.clear()

    def feed_eof(self) -> None:
        """There is no more.

        Raises:
            Refusal: BAD_REQUEST: it is not whole.
        """
        if self._stream is not None:
            raise self._refusal("it ends early")

    def _form(self, packed: bytes) -> int:
        if self._encoding != "deflate":
            return _GZIP
        # Some send what zlib calls raw. RFC 1950: the low half of the first byte is 8.
        return _ZLIB if packed[0] & 0xF == 8 else _RAW

    def _refusal(self, why: str) -> Refusal:
        return Refusal(Fault.BAD_REQUEST, f"the body can't be read as {self._encoding}: {why}")
