"""Memory that a projector and LoRA adapters add to a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sollold.models.footprint.shape import Shape, padded
from sollold.models.footprint.vision import encoder_bytes
from sollold.models.gguf.header import Header

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")


def with_projector(shape: Shape, header: Header) -> Shape:
    """Return the shape of a model with its projector (mmproj), which runs on the head.

    It is on one of the head's GPUs or on its CPU. Its compute buffer is a conservative estimate
    (`sollold.models.footprint.vision`).
    """
    weights = sum(padded(tensor.size) for tensor in header.tensors)
    return replace(shape, projector=shape.projector + weights + encoder_bytes(header))


def with_adapters(shape: Shape, headers: Sequence[Header]) -> Shape:
    """Return the shape of a model with LoRA adapters; each tensor is placed with the one that it changes.

    The slack covers the second product that each adapted matrix needs until the two are added.
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
