"""Ollama's embeddings in llama-server's words. Pure."""

from __future__ import annotations

import math

import msgspec

from sollold.serving.ask import Fault, Refusal


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
