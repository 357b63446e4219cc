"""What a projector and LoRA adapters add to a model's memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sollold.models.gguf import Header
from sollold.models.shape import Shape, padded

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")


def with_projector(shape: Shape, header: Header) -> Shape:
    """The shape of a model with its projector (mmproj), which the head computes, on a GPU of its own or not.

    Its compute buffer is an estimate on the safe side: that of the biggest image that it says it takes, with
    attention's scores written out.
    """
    weights = sum(padded(tensor.size) for tensor in header.tensors)
    return replace(shape, projector=shape.projector + weights + _seen(header))


def with_adapters(shape: Shape, headers: Sequence[Header]) -> Shape:
    """The shape of a model with LoRA adapters: each tensor lies beside the one that it changes.

    Every product with an adapter has a second one beside it until they are added.
    """
    layers = list(shape.layers)
    output, host = shape.output, shape.host_weights
    for header in headers:
        for tensor in header.tensors:
            size = padded(tensor.size)
            match = _BLOCK.match(tensor.name)
            if match and int(match[1]) < len(layers):
                layer = layers[int(match[1])]
                layers[int(match[1])] = replace(
                    layer, weights=layer.weights + size, active=layer.active + size
                )
            elif tensor.name.startswith("token_embd."):
                host += size
            else:
                output += size
    if not headers or shape.n_embd <= 0:
        return shape
    blocks = [layer.block for layer in layers if layer.block is not None]
    widest = max((max(block.q, block.ff, block.used * block.ff_expert) for block in blocks), default=0)
    slack = shape.slack + -(-widest // shape.n_embd)
    return replace(shape, layers=tuple(layers), output=output, host_weights=host, slack=slack)


def _seen(header: Header) -> int:
    """Bytes needed to look at one image, by the sizes in the projector's header."""
    most = 0
    for kind in ("vision", "audio"):
        width = header.integer(f"clip.{kind}.embedding_length")
        inner = header.integer(f"clip.{kind}.feed_forward_length")
        heads = header.integer(f"clip.{kind}.attention.head_count")
        side = header.integer(f"clip.{kind}.image_size")
        patch = header.integer(f"clip.{kind}.patch_size")
        pixels = header.integer("clip.vision.image_max_pixels") or side * side
        places = pixels // max(patch * patch, 1) + 1 if kind == "vision" else _AUDIO_PLACES
        if width > 0:
            most = max(most, 4 * (places * (6 * width + 2 * inner) + heads * places * places + 3 * pixels))
    return most


_AUDIO_PLACES = 1500
"""Places of half a minute of sound, which is what encoders look at together."""
