"""Decompresses request bodies with ``Content-Encoding: gzip``, ``deflate`` or ``zstd`` in pieces.

RFC 9110, 8.4.1, and RFC 8878. Codex sends zstd to a server that takes the place of OpenAI's.

A body can expand to a thousand times its size. Decompressing it at once would block all other requests.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from aiohttp import web

from sollold.errors import Refusal, bad_request

_PACKED_BYTES = 4096
"""Bytes decompressed at once: they may be hundreds of streams, and zlib copies the rest after each."""
_PIECE_BYTES = 256 * 1024
_ZLIB, _RAW, _GZIP = 15, -15, 31
"""zlib's stream formats, as values of ``wbits``."""
_ZSTD_WINDOW = 23
"""Binary logarithm of the largest window of a zstd frame, which takes that many bytes of memory (8 MiB)."""


class _Stream(Protocol):
    """A compressed stream, with the attributes of zlib's decompression objects."""

    @property
    def unconsumed_tail(self) -> bytes: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _ZstdStream:
    """A zstd frame; it holds input that it has not consumed."""

    unconsumed_tail = b""

    def __init__(self) -> None:
        zstd = _zstd()
        limit = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
        self._frame = zstd.ZstdDecompressor(options=limit)
        self._error = zstd.ZstdError

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        try:
            return bytes(self._frame.decompress(data, max_length))
        except self._error as error:
            raise zlib.error(str(error)) from None


def _zstd() -> Any:
    """Return the module for zstd, loaded with the first such body.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


async def decompressed(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the pieces of a body as they arrive, decompressed.

    Raises:
        Refusal: BAD_REQUEST if the body is invalid or truncated, with status 415 for an unknown encoding.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        while piece := await request.content.readany():
            yield piece
        return
    decompressor = Decompressor(encoding)
    while packed := await request.content.readany():
        for begin in range(0, len(packed), _PACKED_BYTES):
            for piece in decompressor.feed(packed[begin : begin + _PACKED_BYTES]):
                yield piece
                # Let other requests run.
                await asyncio.sleep(0)
    decompressor.feed_eof()


def _is_available(encoding: str) -> bool:
    if encoding == "zstd":
        try:
            _zstd()
        except ImportError:
            return False
    return True


class Decompressor:
    """Decompresses one body piece by piece, without holding all of it in memory."""

    def __init__(self, encoding: str) -> None:
        """``encoding``: value of the header, in lower case.

        Raises:
            Refusal: BAD_REQUEST with status 415: the encoding is not supported.
        """
        if encoding not in ("gzip", "x-gzip", "deflate", "zstd") or not _is_available(encoding):
            message = f"Content-Encoding {encoding[:40]} is not supported; send gzip or nothing"
            raise bad_request(message, status=415)
        self._encoding = encoding
        self._stream: _Stream | None = None

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """Decompress ``packed``, and yield the result in pieces of about 256 KiB.

        Raises:
            Refusal: BAD_REQUEST: the data is invalid.
        """
        output, pending = bytearray(), False
        while packed or pending:
            if self._stream is None:
                zstd = self._encoding == "zstd"
                self._stream = _ZstdStream() if zstd else zlib.decompressobj(self._window_bits(packed))
            try:
                piece = self._stream.decompress(packed, _PIECE_BYTES)
            except zlib.error as error:
                raise self._refusal(str(error)) from None
            output += piece
            # All of ``packed`` may be consumed, with more output to come.
            packed, pending = self._stream.unconsumed_tail, len(piece) == _PIECE_BYTES
            if self._stream.eof:
                # Another stream may follow in the same body.
                packed, pending, self._stream = self._stream.unused_data, False, None
            if len(output) >= _PIECE_BYTES or (output and not packed and not pending):
                yield bytes(output)
                output.clear()

    def feed_eof(self) -> None:
        """End the body.

        Raises:
            Refusal: BAD_REQUEST: the body is truncated.
        """
        if self._stream is not None:
            raise self._refusal("it ends early")

    def _window_bits(self, packed: bytes) -> int:
        if self._encoding != "deflate":
            return _GZIP
        # Some clients send what zlib calls raw. RFC 1950: the low half of the first byte is 8.
        return _ZLIB if packed[0] & 0xF == 8 else _RAW

    def _refusal(self, reason: str) -> Refusal:
        return bad_request(f"the body can't be read as {self._encoding}: {reason}")
