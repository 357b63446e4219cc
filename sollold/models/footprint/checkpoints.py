"""Copies of a slot's state that llama-server keeps to go back to.

What slides over a window or is recurrent can't be rolled back: a prompt that leaves the one before early is
read again from the start, unless a checkpoint lies before that place. llama-server makes one or two near the
end of each prompt and at the user's messages, in the head's memory, wherever the layers are.
"""

from __future__ import annotations

from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Layer, Shape
from sollold.models.gguf.tensor_types import by_name
from sollold.settings.schema import MIB

CHECKPOINTS = 3
"""Of a slot: the two of the last prompt, and one before."""
_SHARE = 8
_LEAST = 64 * MIB
"""All checkpoints may take an eighth of what the weights take, or this: a prompt that is read again costs
less than a model that finds no room."""
_CELL = 12
"""Bytes that say of each cell which token it is, beside its rows; once for all layers, but it is little."""


def snapshot(shape: Shape, layer: Layer, run: Run, cells: int) -> int:
    """Bytes of a layer in a checkpoint of one slot, whose cache has ``cells`` for it.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    if not layer.window:
        return layer.recurrent
    rows = by_name(run.type_k).row(layer.k) + by_name(run.type_v).row(layer.v)
    return layer.recurrent + min(cells, shape.window) * (rows + _CELL)


def checkpoints(shape: Shape, run: Run, size: int) -> int:
    """How many a slot may have of ``size`` bytes each; 0 where the model needs none, or can't be reckoned."""
    if size <= 0 or run.embedding or not shape.cached or not shape.known:
        return 0
    weights = shape.output + sum(layer.weights for layer in shape.layers)
    return min(run.checkpoints, max(weights // _SHARE, _LEAST) // (size * run.slots))
