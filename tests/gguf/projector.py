"""Writes small vision projectors (mmproj) with random weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue, NewTensor
from tests.gguf import weights


def write(path: Path | str, text_embd: int, *, embd: int = 64, layers: int = 2, image: int = 56) -> Path:
    """Write a projector as LLaVA's. ``text_embd``: embedding length of its model."""
    patch, heads, ff = 14, 2, 2 * embd
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": image,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": embd,
        "clip.vision.feed_forward_length": ff,
        "clip.vision.block_count": layers,
        "clip.vision.attention.head_count": heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.projection_dim": text_embd,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    positions = (image // patch) ** 2 + 1
    tensors = [
        _tensor(name, shape)
        for name, shape in (
            ("v.class_embd", (embd,)),
            ("v.patch_embd.weight", (patch, patch, 3, embd)),
            ("v.position_embd.weight", (embd, positions)),
            ("v.pre_ln.weight", (embd,)),
            ("v.pre_ln.bias", (embd,)),
            *_blocks(layers, embd, ff),
            ("mm.0.weight", (embd, text_embd)),
            ("mm.0.bias", (text_embd,)),
            ("mm.2.weight", (text_embd, text_embd)),
            ("mm.2.bias", (text_embd,)),
        )
    ]
    writer.write(path, metadata, tensors)
    return Path(path)


def write_merging(path: Path | str, text_embd: int, *, windowed: bool = False, image: int = 560) -> Path:
    """Write a projector as Qwen's, for images of any size. ``windowed``: with windowed attention."""
    patch, embd, heads, layers = 14, 64, 2, 2
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen2.5vl_merger" if windowed else "qwen2vl_merger",
        "clip.use_silu": True,
        "clip.vision.image_size": image,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": embd,
        "clip.vision.feed_forward_length": 2 * embd,
        "clip.vision.block_count": layers,
        "clip.vision.attention.head_count": heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projection_dim": text_embd,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    if windowed:
        metadata["clip.vision.n_wa_pattern"] = 2
    tensors = [
        _tensor(name, shape)
        for name, shape in (
            ("v.patch_embd.weight", (patch, patch, 3, embd)),
            ("v.patch_embd.weight.1", (patch, patch, 3, embd)),
            *_blocks(layers, embd, 2 * embd),
            *((f"v.blk.{block}.ffn_gate.weight", (embd, 2 * embd)) for block in range(layers)),
            *((f"v.blk.{block}.ffn_gate.bias", (2 * embd,)) for block in range(layers)),
            ("v.post_ln.weight", (embd,)),
            ("v.post_ln.bias", (embd,)),
            ("mm.0.weight", (4 * embd, 4 * embd)),
            ("mm.0.bias", (4 * embd,)),
            ("mm.2.weight", (4 * embd, text_embd)),
            ("mm.2.bias", (text_embd,)),
        )
    ]
    writer.write(path, metadata, tensors)
    return Path(path)


def _blocks(layers: int, embd: int, ff: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for block in range(layers):
        for name, shape in (
            ("attn_q", (embd, embd)),
            ("attn_k", (embd, embd)),
            ("attn_v", (embd, embd)),
            ("attn_out", (embd, embd)),
            ("ffn_up", (embd, ff)),
            ("ffn_down", (ff, embd)),
            ("ln1", (embd,)),
            ("ln2", (embd,)),
        ):
            yield f"v.blk.{block}.{name}.weight", shape
            yield f"v.blk.{block}.{name}.bias", shape[-1:]


def _tensor(name: str, shape: tuple[int, ...]) -> NewTensor:
    plain = len(shape) == 1 or "position" in name
    kind = weights.F32 if plain else weights.F16
    return NewTensor(name, shape, kind, functools.partial(weights.data, name, shape, kind, 1))
