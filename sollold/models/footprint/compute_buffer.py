"""Computes what each layer's operations need of a device's compute buffer, pipelined or not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

from sollold.facts import dataclass
from sollold.models.footprint import block_graph
from sollold.models.footprint.block import Batch, Block
from sollold.models.footprint.mixed_layers import NEAR, MixedLayers
from sollold.models.footprint.run_options import Cells, Run
from sollold.models.footprint.shape import Layer, Shape
from sollold.models.gguf.tensor_types import UNPACKED


@dataclass(frozen=True, slots=True)
class Demand:
    """What a layer's operations need, in bytes.

    ``first``, ``later``: when pipelined, as the device's first layer or as a later one; ``alone``: without
    pipelining. ``full``, ``windowed``: which inputs it needs. ``received``, ``sent``: bytes transferred
    besides the hidden state when a device begins or ends with this layer. ``source``: the layer whose cache
    it uses, -1: its own.
    """

    first: int
    later: int
    alone: int
    full: bool = False
    windowed: bool = False
    received: int = 0
    sent: int = 0
    source: int = -1


@dataclass(frozen=True, slots=True)
class Demands:
    """The demands of all layers, with the output last, stored by kind: a planner queries thousands of ranges.

    ``full`` to ``windowed_own``: cumulative counts of the layers before each one that attend in that way, and
    that also have their own cache. ``borrowed``: pairs of a layer and the one whose cache it uses.
    ``varied``: for models that mix recurrent blocks with others; ``first`` to ``alone`` are then 0 except for
    the output.
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    alone: tuple[int, ...]
    received: tuple[int, ...]
    sent: tuple[int, ...]
    full: tuple[int, ...]
    full_own: tuple[int, ...]
    windowed: tuple[int, ...]
    windowed_own: tuple[int, ...]
    borrowed: tuple[tuple[int, int], ...]
    varied: MixedLayers | None

    @classmethod
    def of(cls, needs: Sequence[Demand], varied: MixedLayers | None) -> Demands:
        """Collect the demands of single layers.

        ``varied`` replaces them where a layer's demand depends on its neighbours.
        """

        def cumulative(flags: Iterable[bool]) -> tuple[int, ...]:
            return tuple(itertools.accumulate(flags, initial=0))

        return cls(
            first=tuple(demand.first for demand in needs),
            later=tuple(demand.later for demand in needs),
            alone=tuple(demand.alone for demand in needs),
            received=tuple(demand.received for demand in needs),
            sent=tuple(demand.sent for demand in needs),
            full=cumulative(demand.full for demand in needs),
            full_own=cumulative(demand.full and demand.source < 0 for demand in needs),
            windowed=cumulative(demand.windowed for demand in needs),
            windowed_own=cumulative(demand.windowed and demand.source < 0 for demand in needs),
            borrowed=tuple(
                (index, demand.source) for index, demand in enumerate(needs) if demand.source >= 0
            ),
            varied=varied,
        )

    @property
    def opened(self) -> bool:
        """Whether the extra results on the first layer's device are included in `peak`."""
        return self.varied is not None and self.varied.scaled

    def peak(self, first: int, last: int, *, piped: bool, own: int = 0) -> int:
        """Return the peak bytes of the operations of layers ``first`` to ``last - 1`` on one device.

        ``own``: number of layers on the head's CPU.
        """
        peak = max((self.first if piped else self.alone)[first : first + 1], default=0)
        peak = max(peak, *(self.later if piped else self.alone)[first + 1 : last], 0)
        return peak if self.varied is None else max(peak, self.varied.peak(first, last, piped=piped, own=own))


def demands(shape: Shape, run: Run, cells: Cells, flash: bool) -> Demands:
    """Return the demands of all layers, with the output last."""
    varied = MixedLayers.of(
        tuple(
            (layer.block, batch_of(layer, layer.block, cells, run, flash))
            for layer in shape.layers
            if layer.block is not None
        ),
        slack=shape.slack * shape.n_embd * cells.tokens * 4,
        raw=shape.per_layer * cells.tokens * 4 * sum(layer.block is not None for layer in shape.layers),
        scaled=shape.front > 0,
    )
    needs: list[Demand] = []
    last = max((index for index, layer in enumerate(shape.layers) if layer.block), default=-1)
    kinds = _kinds(shape)
    computed: dict[tuple[object, ...], Demand] = {}
    for index, layer in enumerate(shape.layers):
        # Most layers are identical, and so are their neighbours.
        neighbours = kinds[max(index - NEAR, 0) : index + 1 + NEAR]
        key = (*neighbours, min(index, NEAR), layer.window, layer.source, index == last)
        if key not in computed:
            computed[key] = _demand(shape, index, cells, run, flash, index == last, varied)
        needs.append(computed[key])
    needs.append(_output_demand(shape, cells))
    return Demands.of(needs, varied)


def _kinds(shape: Shape) -> list[int]:
    """Number the layers by kind: layers with equal blocks get the same number."""
    numbers: dict[Block | None, int] = {}
    return [numbers.setdefault(layer.block, len(numbers)) for layer in shape.layers]


def _demand(
    shape: Shape, index: int, cells: Cells, run: Run, flash: bool, last: bool, varied: MixedLayers | None
) -> Demand:
    layer = shape.layers[index]
    if layer.block is None:
        return Demand(0, 0, 0)
    block = layer.block
    batch = batch_of(layer, block, cells, run, flash)
    attends = bool(block.q)
    # Without flash attention the scores leave a hole, and the hidden state is allocated beside it.
    states = shape.slack if flash or (block.fused and block.cached) else max(shape.slack, block.streams)
    # With several streams this counts only where they are created or without pipelining; see
    # `sollold.models.footprint.inputs`.
    pipelined = shape.slack if block.streams > 1 else states
    hidden = shape.n_embd * cells.tokens * 4
    first, later, alone = (
        0 if varied is not None else _peak(block, batch, piped, begins, last) + slack * hidden
        for piped, begins, slack in ((True, True, pipelined), (True, False, pipelined), (False, True, states))
    )
    return Demand(
        first=first,
        later=later,
        alone=alone,
        full=attends and not layer.window,
        windowed=attends and layer.window,
        received=_received(shape, index, cells, varied),
        sent=_sent(shape, index, cells, varied),
        source=layer.source,
    )


def batch_of(layer: Layer, block: Block, cells: Cells, run: Run, flash: bool) -> Batch:
    """Return the dimensions of a layer's computation."""
    return Batch(
        tokens=cells.tokens,
        outputs=cells.outputs,
        sequences=cells.sequences,
        cells=cells.seen(layer.window),
        flash=flash,
        rotate_k=run.type_k not in UNPACKED and block.head_k % 64 == 0,
        rotate_v=run.type_v not in UNPACKED and block.head_v % 64 == 0,
        kept=run.states - 1,
    )


def _received(shape: Shape, index: int, cells: Cells, varied: MixedLayers | None) -> int:
    """Return the bytes, besides the hidden state, that a device beginning with a layer receives.

    RWKV 7's was measured, not derived.
    """
    block = shape.layers[index].block
    unit = cells.tokens * 4
    if block is None or (index == 0 and not shape.positions):
        return 0
    if index == 0:
        return shape.n_embd * unit
    if varied is not None:
        return varied.passed(index)[0]
    if block.mixer == "rwkv6":
        # The norm of its feed-forward layer, and the same for the previous token.
        return shape.n_embd * unit * 2
    if block.mixer == "rwkv7":
        return shape.n_embd * unit * 5 // 2
    return 0


def _sent(shape: Shape, index: int, cells: Cells, varied: MixedLayers | None) -> int:
    """Return the bytes sent back to a device that ends with a layer; see `_received`."""
    block = shape.layers[index].block
    if block is None:
        return 0
    if varied is not None:
        return varied.passed(index + 1)[1]
    return shape.n_embd * cells.tokens * 4 if block.mixer.startswith("rwkv") else 0


@functools.lru_cache(maxsize=4096)
def _peak(block: Block, batch: Batch, piped: bool, first: bool, last: bool) -> int:
    """Return the peak bytes of a block among identical ones: after three the pattern repeats."""
    row = ((block, batch),) * (1 if last else 3)
    return max(block_graph.peaks(row, (), piped=piped, first=first, last=last))


def _output_demand(shape: Shape, cells: Cells) -> Demand:
    """Return the demand of the output norm and logits beside the hidden state (no logits for embedders)."""
    if not shape.cached:
        normed = 2 * shape.n_embd * cells.tokens * 4 if shape.output else 0
        return Demand(normed, normed, normed)
    hidden, logits = shape.n_embd * cells.outputs * 4, shape.n_vocab * cells.outputs * 4
    if shape.late:
        hidden += shape.n_embd * cells.tokens * 4
    return Demand(hidden + logits, 2 * hidden + logits, 2 * hidden + logits)
