"""Memory of llama-server's context checkpoints, the copies of a slot's state that it can return to.

A sliding window or a recurrent state can't be rolled back: a prompt that diverges early from the previous one
is processed again from the start, unless a checkpoint precedes that point. llama-server makes one or two near
the end of each prompt and at the user's messages, in the head's memory, wherever the layers are.
"""

from __future__ import annotations

from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Layer, Shape
from sollold.models.gguf.tensor_types import by_name
from sollold.settings.schema import MIB

CHECKPOINTS = 3
"""Checkpoints per slot: two for the last prompt, and one earlier."""
_SHARE = 8
_MIN_BYTES = 64 * MIB
"""All checkpoints together may take an eighth of the size of the weights, or ``_MIN_BYTES`` if that is more:
processing a prompt again costs less than a model that does not fit."""
_CELL = 12
"""Metadata of each cell (its token's position and sequence) beside its rows, in bytes. Stored once for all
layers but counted for each; it is small."""


def snapshot(shape: Shape, layer: Layer, run: Run, cells: int) -> int:
    """Return the bytes of a layer in a checkpoint of one slot with ``cells`` cache cells in that layer.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    if not layer.window:
        return layer.recurrent
    rows = by_name(run.type_k).row(layer.k) + by_name(run.type_v).row(layer.v)
    return layer.recurrent + min(cells, shape.window) * (rows + _CELL)


def checkpoints(shape: Shape, run: Run, size: int) -> int:
    """Return how many checkpoints of ``size`` bytes each slot may have.

    0 if the model needs none, or if its size can't be computed.
    """
    if size <= 0 or run.embedding or not shape.cached or not shape.known:
        return 0
    weights = shape.output + sum(layer.weights for layer in shape.layers)
    return min(run.checkpoints, max(weights // _SHARE, _MIN_BYTES) // (size * run.slots))
