"""How many bytes each layer of a model takes on a device, before anything is loaded.

The formulas are llama.cpp's own: ``llama_kv_cache``, ``llama_memory_recurrent`` and, for compute buffers, the
graph allocator's rules applied to each block (`sollold.models.blocks`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sollold.models import blocks
from sollold.models.blocks import Batch, Block
from sollold.models.run import Run
from sollold.models.shape import Layer, Shape
from sollold.models.tensor_type import by_name

_COPIES = 4
"""Copies of a device's inputs when batches are pipelined (GGML_SCHED_MAX_COPIES)."""

_UNPACKED = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model run in one way.

    Layers are counted as everywhere: 0 to L - 1 the blocks, L the output group.

    Attributes:
        layers: L.
        weights: L + 1 entries, the last the output group with its norm.
        state: L entries: KV cache and recurrent state.
        active: L + 1 entries: bytes that one token reads (of experts only those used).
        host_weights: on the head's processor whatever is offloaded (token embedding).
        host_buffers: on the head's processor besides: logits and the like.
        largest_tensor: held once more while loading, by the head and by a device's worker.
        estimate: the architecture is not known; everything is on the safe side.
    """

    layers: int
    weights: tuple[int, ...]
    state: tuple[int, ...]
    active: tuple[int, ...]
    host_weights: int
    host_buffers: int
    largest_tensor: int
    n_embd: int
    n_vocab: int
    context_train: int
    estimate: bool
    _demands: tuple[_Demand, ...]
    _inputs: _Inputs

    def compute(self, first: int, last: int, *, devices: int, local: bool, offloaded: int) -> int:
        """Compute buffer of a device that holds layers ``first`` to ``last - 1`` (L: the output).

        ``devices``: how many the model is spread over; ``local``: on the head's own machine;
        ``offloaded``: how many of the L + 1 layers have left the head's processor.
        """
        if first >= last:
            return 0
        piped = devices > 1 and offloaded > self.layers
        held = self._demands[first:last]
        # The first layer's input is one of the device's inputs, which pipelining keeps.
        peak = max(demand.later if piped else demand.alone for demand in held[1:] or held)
        peak = max(peak, held[0].first if piped else held[0].alone)
        inputs = self._inputs.besides(held, first=first == 0)
        if not piped:
            return peak + inputs
        return peak + _COPIES * (
            inputs + (self._inputs.hidden if first < self.layers else self._inputs.chosen)
        )

    def host_compute(self, *, devices: int, offloaded: int) -> int:
        """Compute buffer of the head's processor, its own first layers (those not offloaded) included."""
        own = max(self.layers + 1 - offloaded, 0)
        piped = devices > 1 and own == 0
        held = self._demands[:own]
        peak = max((demand.alone for demand in held), default=self._inputs.looked_up)
        return peak + (_COPIES if piped else 1) * self._inputs.host


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a layer's operations need: pipelined as the first of a device, pipelined as a later one, without
    pipelining; and which inputs.
    """

    first: int
    later: int
    alone: int
    full: bool = False
    windowed: bool = False
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Bytes of what each device is given for one ubatch.

    ``hidden``: the hidden state; ``chosen``: of the tokens that are output; ``full``, ``windowed``: masks
    and indices of attention; ``always``: positions and the like; ``per_layer``: embeddings of the layers'
    own; ``host``: what the head keeps of all inputs; ``looked_up``: what the head computes of them.
    """

    hidden: int
    chosen: int
    full: int
    windowed: int
    always: int
    per_layer: int
    host: int
    looked_up: int

    def besides(self, held: tuple[_Demand, ...], *, first: bool) -> int:
        """Inputs of a device besides the hidden state."""
        total = self.always
        if any(demand.full for demand in held):
            total += self.full
        if any(demand.windowed for demand in held):
            total += self.windowed
        return total


def footprint(shape: Shape, run: Run) -> Footprint:
    """The bytes of a model of this shape, run in this way.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    type_k, type_v = by_name(run.type_k), by_name(run.type_v)
    cells = _Cells.of(shape, run)
    flash = run.flash != "off"
    widest_v = max((layer.v for layer in shape.layers), default=0)
    state, demands = [], []
    last = max((index for index, layer in enumerate(shape.layers) if layer.block), default=-1)
    for index, layer in enumerate(shape.layers):
        rows = cells.windowed if layer.window else cells.full
        v = layer.v if flash or not layer.v else widest_v
        kv = rows * cells.streams * (type_k.row(layer.k) + type_v.row(v))
        state.append(kv + layer.recurrent * run.slots)
        demands.append(_demand(layer, cells, run, flash, index == last))
    demands.append(_output_demand(shape, cells))
    return Footprint(
        layers=len(shape.layers),
        weights=(*(layer.weights for layer in shape.layers), shape.output),
        state=tuple(state),
        active=(*(layer.active for layer in shape.layers), shape.output),
        host_weights=shape.host_weights,
        host_buffers=(shape.n_vocab + shape.n_embd) * cells.outputs * 4,
        largest_tensor=shape.largest_tensor,
        n_embd=shape.n_embd,
        n_vocab=shape.n_vocab,
        context_train=shape.context_train,
        estimate=not shape.known,
        _demands=tuple(demands),
        _inputs=_inputs(shape, cells, flash, widest_v),
    )


@dataclass(frozen=True, slots=True)
class _Cells:
    """The sizes of a run: cells of the caches of one stream, streams, tokens and outputs of a ubatch."""

    full: int
    windowed: int
    streams: int
    tokens: int
    outputs: int
    sequences: int

    @classmethod
    def of(cls, shape: Shape, run: Run) -> _Cells:
        context = _pad(run.context or shape.context_train, 256)
        streams = 1 if run.unified else run.slots
        full = context if run.unified else _pad(context // run.slots, 256)
        total = full * streams
        ubatch = min(run.ubatch, run.batch, total)
        windowed = min(full, _pad(shape.window * (run.slots if run.unified else 1) + ubatch, 256))
        tokens = _pad(ubatch, run.slots)
        outputs = tokens if run.embedding or not shape.cached else min(run.slots, tokens)
        return cls(full, windowed, streams, tokens, outputs, run.slots)


def _demand(layer: Layer, cells: _Cells, run: Run, flash: bool, last: bool) -> _Demand:
    if layer.block is None:
        return _Demand(0, 0, 0)
    block = layer.block
    batch = Batch(
        tokens=cells.tokens,
        outputs=cells.outputs,
        sequences=cells.sequences,
        cells=cells.windowed if layer.window else cells.full,
        flash=flash,
        rotate_k=run.type_k not in _UNPACKED and block.head_k % 64 == 0,
        rotate_v=run.type_v not in _UNPACKED and block.head_v % 64 == 0,
    )
    attends = bool(block.q)
    return _Demand(
        first=_peak(block, batch, True, True, last),
        later=_peak(block, batch, True, False, last),
        alone=_peak(block, batch, False, True, last),
        full=attends and not layer.window,
        windowed=attends and layer.window,
        recurrent=layer.recurrent > 0,
    )


@functools.lru_cache(maxsize=4096)
def _peak(block: Block, batch: Batch, piped: bool, first: bool, last: bool) -> int:
    return blocks.peak(block, batch, piped=piped, first=first, last=last)


def _output_demand(shape: Shape, cells: _Cells) -> _Demand:
    """The output norm and the logits; the hidden state is there beside them."""
    hidden, logits = shape.n_embd * cells.outputs * 4, shape.n_vocab * cells.outputs * 4
    return _Demand(hidden + logits, 2 * hidden + logits, 2 * hidden + logits)


def _inputs(shape: Shape, cells: _Cells, flash: bool, widest_v: int) -> _Inputs:
    width = 2 if flash else 4
    tokens = cells.tokens
    hidden = shape.n_embd * tokens * 4
    indices = 8 * tokens + 8 * tokens * (1 if flash else max(widest_v, 1))
    cached = shape.cached
    full = cells.full * tokens * width + indices if cached else tokens * tokens * width
    windowed = cells.windowed * tokens * width + indices if cached else full
    always = 4 * tokens + 4 * cells.outputs
    has_full = any(layer.block and layer.block.q and not layer.window for layer in shape.layers)
    has_windowed = any(layer.window for layer in shape.layers)
    host = hidden + 4 * tokens + always + full * has_full + windowed * has_windowed
    return _Inputs(
        hidden=hidden * max((layer.block.streams for layer in shape.layers if layer.block), default=1),
        chosen=shape.n_embd * cells.outputs * 4,
        full=full,
        windowed=windowed,
        always=always,
        per_layer=shape.per_layer * tokens * 4,
        host=host,
        looked_up=hidden,
    )


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
