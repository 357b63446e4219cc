"""Computes what drafting by a model's own MTP layer takes besides the layer and its cache.

llama-server creates a second context of the same model for it, with its own compute buffers and results; and
the first context outputs the hidden state of every token, from which the layer predicts. After ``graph_mtp``
in llama.cpp's src/models/*.cpp and ``common_speculative_impl_draft_mtp`` in common/speculative.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from sollold.facts import dataclass
from sollold.models.footprint.block import FLOAT, Batch
from sollold.models.footprint.block_graph import add_block
from sollold.models.footprint.compute_buffer import batch_of
from sollold.models.footprint.device_boundary import ALIGNED
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.inputs import inputs
from sollold.models.footprint.run_options import Cells, Run
from sollold.models.footprint.shape import Layer, Predicting, Shape

_COPIES = 4
_ROWS, _NEAR_ROWS = 5, 3
"""Copies of the hidden states of a batch, and of a ubatch, that llama-server holds. Measured: the first
context's results, the second's input, those of the last batch, and the buffers for copying them."""


def with_mtp_layer(shape: Shape) -> Shape:
    """Return the shape of a model with its MTP layer loaded, which is no part of the main graph.

    Outputs are selected after the last block, since the layer receives all hidden states.
    """
    if shape.predicting is None:
        return shape
    layers = [
        replace(layer, block=replace(layer.block, late=True)) if layer.block else layer
        for layer in shape.layers[:-1]
    ]
    mtp_layer = replace(shape.predicting.layer, block=None, active=0)
    return replace(shape, layers=(*layers, mtp_layer))


@dataclass(frozen=True, slots=True)
class SecondContext:
    """The bytes of the second context. ``layer``: index of the MTP layer, the last of the blocks.

    ``there``, ``apart``: need of its operations on its device, if that also has the output or if not, each as
    (without pipelining, with pipelining); ``given``: inputs of that device. ``large``: the hidden states and
    the mask among its inputs; without pipelining they are included in ``there`` and ``apart``. ``after``,
    ``passed``: operations and inputs on the output's device, if that is another. ``host``, ``looked_up``:
    inputs on the head's CPU, and what it computes from them. ``results``: its results in the head's memory.
    """

    layer: int
    there: tuple[int, int]
    apart: tuple[int, int]
    given: tuple[int, int]
    large: int
    after: int
    passed: int
    host: int
    looked_up: int
    results: int

    @classmethod
    def of(
        cls, shape: Shape, predicting: Predicting, run: Run, cells: Cells, *, flash: bool
    ) -> SecondContext:
        """Compute the second context of a model's MTP layer. ``shape``: the model's shape without it."""
        layer = predicting.layer
        assert layer.block is not None, "a layer that predicts has a block"
        mtp_shape = replace(shape, layers=(replace(layer, source=-1),), slack=0)
        needs = inputs(mtp_shape, replace(run, drafts=0), replace(cells, outputs=run.slots), flash, layer.v)
        batch = replace(batch_of(layer, layer.block, cells, run, flash), outputs=run.slots)
        hidden = shape.n_embd * cells.tokens * FLOAT
        given = needs.always + needs.indices
        large = needs.full + hidden * (1 if predicting.embeds else 2)
        graphs = _Graphs(shape, predicting, layer, batch, needs.full)
        passed = after = 0
        if not (predicting.norms and predicting.heads):
            chosen = shape.n_embd * run.slots * FLOAT
            passed = chosen if predicting.norms else hidden
            after = chosen + (shape.n_vocab * run.slots * FLOAT) * (not predicting.heads)
            after += hidden * (not predicting.norms)
        return cls(
            layer=len(shape.layers) - 1,
            there=(graphs.peak(piped=False, output=True), graphs.peak(piped=True, output=True)),
            apart=(graphs.peak(piped=False, output=False), graphs.peak(piped=True, output=False)),
            given=(given, given + large),
            large=large,
            after=after,
            passed=passed,
            host=hidden + 4 * cells.tokens + needs.always + needs.full + needs.indices,
            looked_up=hidden * (not predicting.embeds),
            results=(shape.n_vocab + shape.n_embd) * run.slots * FLOAT
            + _ROWS * shape.n_embd * run.batch * FLOAT
            + _NEAR_ROWS * hidden,
        )

    def compute(self, first: int, last: int, *, piped: bool) -> int:
        """Return its compute buffer on the device that holds layers ``first`` to ``last - 1``, in bytes."""
        copies = _COPIES if piped else 1
        if first <= self.layer < last:
            return (self.there if last > self.layer + 1 else self.apart)[piped] + copies * self.given[piped]
        if first == self.layer + 1 < last:
            return self.after + copies * self.passed if self.passed else 0
        return 0

    def host_compute(self, *, own: int, piped: bool) -> int:
        """Return its compute buffer on the head's CPU, which has the first ``own`` layers."""
        total = self.looked_up + (_COPIES if piped else 1) * self.host
        if own > self.layer + 1:
            return total + self.there[False] - self.large
        return total


@dataclass(frozen=True, slots=True)
class _Graphs:
    shape: Shape
    predicting: Predicting
    layer: Layer
    batch: Batch
    mask: int

    def peak(self, *, piped: bool, output: bool) -> int:
        """Return the peak bytes of its operations on its device, and unless ``piped`` of their inputs.

        With pipelining the inputs lie before everything and are never freed. ``output``: the device has the
        output matrix too.
        """
        graph = Graph()
        tokens = self.batch.tokens
        hidden = self.shape.n_embd * tokens * FLOAT
        block = self.layer.block
        assert block is not None
        batch = self.batch
        if piped:
            state, word = graph.add(hidden), graph.add(hidden)
        else:
            source = graph.add(hidden)
            word = graph.add(hidden)
            graph.add(ALIGNED, kept=True)
            batch = replace(batch, mask=graph.add(self.mask))
            state, word = graph.add(hidden, source, inplace=True), graph.add(hidden, word, inplace=True)
        joint = graph.add(2 * hidden, word, state)
        result = add_block(graph, replace(block, late=True), batch, graph.add(hidden, joint))
        if output or self.predicting.norms:
            result = graph.add(hidden, result, inplace=True, kept=True)
            result = graph.add(self.shape.n_embd * self.batch.outputs * FLOAT, result)
        if output or self.predicting.heads:
            graph.add(self.shape.n_vocab * self.batch.outputs * FLOAT, result)
        # In a dense layer the norm and the mask leave holes that are too small for what follows: measured,
        # not derived.
        fed = block.ff * tokens * FLOAT
        wide = (2 + block.gated) * fed + 2 * hidden + (self.mask if not piped and self.mask < fed else 0)
        return max(graph.peak(), wide)
