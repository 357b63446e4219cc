"""Ollama's embeddings in llama-server's words. Pure."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from sollold.serving.ask import Fault, Refusal

_BATCH = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx(?:_seq)?\D{1,4}(\d+)")


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


_answer = msgspec.json.Decoder(_Answer)


def read_embeddings(raw: bytes) -> tuple[list[list[float]], int]:
    """(vectors in the order of the texts, tokens) from an answer of ``/v1/embeddings``.

    Raises:
        Refusal: ENGINE.
    """
    try:
        answer = _answer.decode(raw)
    except msgspec.MsgspecError as error:
        raise Refusal(Fault.ENGINE, f"the engine's embeddings can't be read: {error}") from None
    return [
        one.embedding for one in sorted(answer.data, key=lambda one: one.index)
    ], answer.usage.prompt_tokens


def normalized(vector: list[float]) -> list[float]:
    """``vector`` at length 1; zeros stay."""
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector] if length > 0 else vector


def shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first ``dimensions`` of a vector, at length 1 (Matryoshka)."""
    if dimensions is not None and 0 < dimensions < len(vector):
        vector = vector[:dimensions]
    return normalized(vector)


def longest_input(refusal: Refusal) -> int | None:
    """Tokens that the engine would have taken, when it refused a text as too long; else ``None``."""
    text = refusal.message
    if refusal.fault is not Fault.ENGINE or not ("too l" in text or "exceed" in text):
        return None
    match = _BATCH.search(text)
    if match is None:
        return None
    return int(next(group for group in match.groups() if group))


def read_tokens(raw: bytes) -> list[int]:
    """The tokens in an answer of ``/tokenize``.

    Raises:
        Refusal: ENGINE.
    """
    try:
        tokens: Any = msgspec.json.decode(raw)["tokens"]
        return [int(token) for token in tokens]
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        raise Refusal(Fault.ENGINE, "the engine's tokens can't be read") from None
