"""Random tensor data in ggml's types, reproducible and scaled to keep activations bounded."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from sollold.models.gguf.tensor_types import TENSOR_TYPES

F32, F16, Q4_0, Q8_0, BF16, MXFP4 = 0, 1, 2, 8, 30, 39
TYPES = {TENSOR_TYPES[number].name.lower(): number for number in (F32, F16, Q4_0, Q8_0, BF16, MXFP4)}

_CHUNK = 1 << 20


def data(name: str, shape: tuple[int, ...], kind: int, seed: int, quiet: int = 0) -> Iterator[bytes]:
    """The bytes of a tensor in chunks; equal for the same name, shape, type and seed.

    The first ``quiet`` rows are much smaller, so that the tokens of these rows of an output matrix are never
    generated.
    """
    elements = math.prod(shape)
    fixed = _fixed(name)
    if fixed is not None:
        assert kind == F32, f"{name} has to be F32"
        yield np.full(elements, fixed, np.float32).tobytes()
        return
    source = np.random.Generator(np.random.SFC64(seed ^ zlib.crc32(name.encode())))
    spread = 1.0 / math.sqrt(max(shape[0], 1))
    parts = ((quiet * shape[0], spread / 256), (elements - quiet * shape[0], spread))
    for count, part_spread in parts:
        for start in range(0, count, _CHUNK):
            yield _chunk(source, min(_CHUNK, count - start), kind, part_spread)


def _fixed(name: str) -> float | None:
    """The constant value of tensors that must not be random; None: the tensor is random."""
    last = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    if name.endswith(".bias"):
        return 0.0
    if last == "ssm_a":
        return -1.0
    if (
        "norm" in last
        or last.startswith(("ln", "pre_ln"))
        or last in ("rope_freqs", "rope_factors_long", "rope_factors_short", "ssm_d")
    ):
        return 1.0
    return None


def _chunk(source: np.random.Generator, count: int, kind: int, spread: float) -> bytes:
    if kind == F32:
        return (source.standard_normal(count, np.float32) * np.float32(spread)).tobytes()
    if kind in (F16, BF16):
        # Random sign and fraction with a fixed exponent: faster than rounding floats.
        bits = np.frombuffer(source.bytes(2 * count), np.uint16)
        exponent = math.floor(math.log2(spread))
        if kind == F16:
            return (bits & 0x83FF | max(1, 15 + exponent) << 10).astype(np.uint16).tobytes()
        return (bits & 0x807F | 127 + exponent << 7).astype(np.uint16).tobytes()
    known = TENSOR_TYPES[kind]
    blocks = count // known.block
    raw = np.frombuffer(source.bytes(blocks * known.size), np.uint8).reshape(blocks, known.size).copy()
    if kind == Q8_0:
        raw[:, :2] = np.frombuffer(np.float16(spread / 73.6).tobytes(), np.uint8)
    elif kind == Q4_0:
        raw[:, :2] = np.frombuffer(np.float16(spread / 4.6).tobytes(), np.uint8)
    elif kind == MXFP4:
        # The block's scale is 2 ** (byte - 128).
        raw[:, :1] = max(1, 128 + round(math.log2(spread / 3.6)))
    else:
        raise ValueError(f"no random {known.name}")
    return raw.tobytes()
