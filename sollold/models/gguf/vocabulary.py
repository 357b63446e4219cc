"""Fingerprints of vocabularies: whether two models give the same numbers to the same token strings.

llama.cpp requires this of a model that drafts for another (``common_speculative_are_compatible``): the same
kind of tokenizer, the same begin and end tokens, the same strings. Sizes may differ by some tokens, since
models of one family are padded differently.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from sollold.models.gguf.header import Array, Header

_TOKENS = "tokenizer.ggml.tokens"
_STEP = 1024
"""Granularity of the comparison: tokens beyond the last multiple of this may differ in padding."""
_MAX_DIFFERENCE = 128
"""llama.cpp's ``SPEC_VOCAB_MAX_SIZE_DIFFERENCE``."""
_MAX_BYTES, _MAX_TOKENS = 64 << 20, 1 << 21
_LENGTH = struct.Struct("<Q")


def vocabulary(header: Header) -> str:
    """Return the count and hash of a model's tokens; empty when it has none, or too many to read. Blocks.

    Raises:
        OSError: the file can't be read any more.
    """
    tokens = header.metadata.get(_TOKENS)
    if not isinstance(tokens, Array) or tokens.scalar or not 0 < tokens.length <= _MAX_TOKENS:
        return ""
    begin, end = tokens.span
    if end - begin > _MAX_BYTES:
        return ""
    count = tokens.length // _STEP * _STEP or tokens.length
    if tokens.values is not None:
        texts = b"".join(_LENGTH.pack(len(text)) + text for text in map(_encoded, tokens.values[:count]))
    else:
        with Path(header.files[0]).open("rb") as file:
            file.seek(begin)
            texts = file.read(end - begin)
        texts = texts[: _end_of(texts, count)]
    adds_eos = header.metadata.get("tokenizer.ggml.add_eos_token") is True
    facts = (
        header.text("tokenizer.ggml.model"),
        header.metadata.get("tokenizer.ggml.add_bos_token"),
        header.integer("tokenizer.ggml.bos_token_id", -1),
        adds_eos,
        header.integer("tokenizer.ggml.eos_token_id", -1) if adds_eos else -1,
    )
    digest = hashlib.sha256(repr(facts).encode() + texts).hexdigest()
    return f"{tokens.length}:{digest[:24]}"


def compatible(first: str, second: str) -> bool:
    """Return whether a model with one vocabulary can draft for a model with the other."""
    count, _, digest = first.partition(":")
    second_count, _, second_digest = second.partition(":")
    if not digest or digest != second_digest:
        return False
    try:
        return abs(int(count) - int(second_count)) <= _MAX_DIFFERENCE
    except ValueError:
        return False  # another node's, which may be anything


def _end_of(texts: bytes, count: int) -> int:
    """Return the offset at which the first ``count`` strings end."""
    offset = 0
    for _ in range(count):
        if offset + 8 > len(texts):
            break
        offset += 8 + int(_LENGTH.unpack_from(texts, offset)[0])
    return min(offset, len(texts))


def _encoded(text: object) -> bytes:
    return str(text).encode("utf-8", "surrogateescape")
