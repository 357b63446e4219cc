"""Computes the inputs of devices for each ubatch: hidden state, masks, positions and cache row indices."""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.compute_buffer import Demands
from sollold.models.footprint.drafts_with_images import FOURFOLD
from sollold.models.footprint.run_options import Cells, Run
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.tensor_types import UNPACKED


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of each device for one ubatch, in bytes.

    ``hidden``: the hidden state; ``chosen``: that of the output tokens only; ``full``, ``windowed``:
    attention masks; ``indices``: the cache rows that new tokens are written to; ``always``: positions and the
    like; ``per_layer``, ``raw``: the per-layer embedding of one layer, and of all layers together; ``front``:
    what the first block's device holds besides; ``joins``: inputs of the output's device for joining several
    streams; ``begins``, ``ends``: memory for splitting the hidden state into streams, and for joining them;
    ``makes``: memory for computing the per-layer embeddings beside the streams, without pipelining;
    ``turned``: one of the streams, for which there is no hole; ``holes``: holes left by attention scores
    where the streams are created; ``host``: the head's copy of all inputs; ``looked_up``: what the head
    computes from them.
    """

    hidden: int
    chosen: int
    full: int
    windowed: int
    indices: int
    always: int
    per_layer: int
    raw: int
    front: int
    joins: int
    begins: int
    makes: int
    turned: int
    holes: int
    ends: int
    host: int
    looked_up: int

    def of_all(self, needs: Demands, first: int, last: int) -> int:
        """Return the bytes of the inputs shared by layers ``first`` to ``last - 1``."""
        total = self.always
        if needs.full[last] > needs.full[first]:
            total += self.full + self.indices * (needs.full_own[last] > needs.full_own[first])
        if needs.windowed[last] > needs.windowed[first]:
            total += self.windowed + self.indices * (needs.windowed_own[last] > needs.windowed_own[first])
        return total


def inputs(shape: Shape, run: Run, cells: Cells, flash: bool, widest_v: int) -> Inputs:
    """Return the inputs of every device. ``widest_v``: elements of the widest layer's values."""
    width = 2 if flash else 4
    tokens = cells.tokens
    hidden = shape.n_embd * tokens * 4
    indices = 8 * tokens + 8 * tokens * (1 if flash else max(widest_v, 1))
    indices += _rotations(shape, run)
    if shape.cached:
        full, windowed = cells.full * tokens * width, cells.windowed * tokens * width
    else:
        full = windowed = tokens * tokens * width
        indices = 0
    attends = [layer for layer in shape.layers if layer.block and layer.block.q]
    if any(layer.block and layer.block.indexer for layer in attends):
        # The indexer has a cache and a mask of its own.
        full += cells.full * tokens * 2 + 8 * tokens
    if not shape.known and shape.window:
        full += windowed + indices
    lightning = max(
        (layer.block.heads for layer in shape.layers if layer.block and layer.block.mixer == "lightning"),
        default=0,
    )
    masks = (full + indices) * any(not layer.window for layer in attends)
    masks += (windowed + indices) * any(layer.window for layer in attends)
    streams = max((layer.block.streams for layer in shape.layers if layer.block), default=1)
    positions = 4 * tokens * (4 if shape.architecture in FOURFOLD else 1)
    # Lightning attention gets a weight for each pair of tokens and each head.
    always = positions + 4 * cells.outputs + lightning * tokens * tokens * 4
    per_layer = shape.per_layer * tokens * 4
    raw = per_layer * sum(layer.block is not None for layer in shape.layers)
    many_streams = streams > 1
    return Inputs(
        # With several streams: one of them, all of them transposed, and all of them (Gemma 3n).
        hidden=hidden * (2 * streams + 1) if many_streams else hidden,
        chosen=hidden if shape.late else shape.n_embd * cells.outputs * 4 * (shape.output > 0),
        full=full,
        windowed=windowed,
        indices=indices,
        always=always,
        per_layer=per_layer,
        raw=raw,
        front=shape.front * hidden,
        joins=raw + hidden if many_streams else 0,
        begins=4 * streams * hidden if many_streams else 0,
        # The second term was measured, not derived: holes that were too small for the embedding.
        makes=3 * raw + min(4 * streams * hidden, 2 * streams * hidden + raw // 5) * many_streams,
        turned=hidden if many_streams else 0,
        holes=streams * hidden if many_streams and not flash else 0,
        ends=2 * (streams + 1) * hidden if many_streams else 0,
        host=hidden + 4 * tokens + always + masks,
        looked_up=hidden * (2 if shape.positions else 1) + raw,
    )


def _rotations(shape: Shape, run: Run) -> int:
    """Return the bytes of the matrices that rotate the rows of a quantized cache."""
    total = 0
    blocks_with_heads = [layer.block for layer in shape.layers if layer.block and layer.block.q]
    for kind, size in (
        (run.type_k, max((block.head_k for block in blocks_with_heads), default=0)),
        (run.type_v, max((block.head_v for block in blocks_with_heads), default=0)),
    ):
        if kind not in UNPACKED and size and size % 64 == 0:
            total += 4 * (size & -size) ** 2
    return total
