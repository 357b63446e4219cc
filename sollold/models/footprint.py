"""How many bytes each layer of a model takes on a device, before anything is loaded.

The formulas are llama.cpp's own: ``llama_kv_cache``, ``llama_memory_recurrent`` and, for compute buffers, the
graph allocator's rules applied to each block (`sollold.models.blocks`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sollold.models import blocks
from sollold.models.block import Batch, Block
from sollold.models.checkpoints import checkpoints, snapshot
from sollold.models.run import Run
from sollold.models.shape import Shape
from sollold.models.tensor_type import by_name

_COPIES = 4
"""Copies of a device's inputs when batches are pipelined (GGML_SCHED_MAX_COPIES)."""

_TOKEN = 400
"""Bytes of llama-server's memory for each token that it knows: its text, its place in tables, the merges that
make it. Measured: 170 with none, 390 with two merges a token."""
_UNPACKED = ("f32", "f16", "bf16")
_FOURFOLD = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next")
"""Architectures whose tokens have four positions."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model run in one way.

    Layers are counted as everywhere: 0 to L - 1 the blocks, L the output group.

    Attributes:
        layers: L.
        weights: L + 1 entries, the last the output group with its norm.
        state: L entries: KV cache and recurrent state.
        active: L + 1 entries: bytes that one token reads (of experts only those used).
        host_weights: on the head's processor whatever is offloaded (token embedding), the projector included.
        projector: what of that is on a GPU of the head's instead, where one holds layers.
        host_buffers: on the head's processor besides: logits and the like, the vocabulary, the checkpoints.
        checkpoints: copies of its state that each slot may keep (`sollold.models.checkpoints`).
        snapshots: L entries: bytes of each layer in one of them.
        results: of ``host_buffers`` what is read off for each token: logits or embeddings.
        tied: of the output's weights, a second copy of the token embedding.
        largest_tensor: held once more while the head loads; ``largest``: L + 1 entries, the largest of each
            layer, held once more by a worker that is sent it.
        experts: L entries: what of ``weights`` are experts, which can stay with the head's processor.
        estimate: the architecture is not known; everything is on the safe side.
        slots: requests at a time.
    """

    layers: int
    weights: tuple[int, ...]
    state: tuple[int, ...]
    active: tuple[int, ...]
    host_weights: int
    projector: int
    host_buffers: int
    checkpoints: int
    snapshots: tuple[int, ...]
    results: int
    tied: int
    largest_tensor: int
    largest: tuple[int, ...]
    experts: tuple[int, ...]
    n_embd: int
    n_vocab: int
    context_train: int
    estimate: bool
    slots: int
    _demands: _Demands
    _inputs: _Inputs

    def host_tensors(self, layers: int) -> int:
        """Bytes of tensors on the head's processor when it holds the first ``layers``, the output the last.

        Where it holds all of them, an output tied to the token embedding needs no copy.
        """
        return self.host_weights + sum(self.weights[:layers]) - self.tied * (layers > self.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """What all checkpoints of all slots take of ``host_buffers``."""
        return self.checkpoints * self.slots * sum(self.snapshots)

    def compute(self, first: int, last: int, *, devices: int, offloaded: int) -> int:
        """Compute buffer of a device that holds layers ``first`` to ``last - 1`` (L: the output).

        ``devices``: how many the model is spread over; ``offloaded``: how many of the L + 1 layers have left
        the head's processor.
        """
        if first >= last:
            return 0
        piped = devices > 1 and offloaded > self.layers
        needs, inputs = self._demands, self._inputs
        given = inputs.of_all(needs, first, last)
        if first > 0:
            given += inputs.per_layer * (min(last, self.layers) - first)
        for index, source in needs.borrowed:
            if source < first <= index < last:
                given += self.state[source]
        # The first layer's input is one of the device's inputs, which pipelining keeps.
        peak = max((needs.later if piped else needs.alone)[first + 1 : last], default=0)
        peak = max(peak, (needs.first if piped else needs.alone)[first])
        if first == 0:
            # What all layers have of their own is made here; pipelining keeps what it is made of.
            peak = max(peak + inputs.raw + inputs.front, (2 if piped else 3) * inputs.raw + inputs.begins)
            given += inputs.raw * piped
        elif last > self.layers:
            peak = max(peak, inputs.joins and inputs.joins + inputs.ends * piped)
            given += inputs.joins * piped
        if not piped:
            return peak + given
        given += inputs.hidden if first < self.layers else inputs.chosen
        given += needs.received[first] + (needs.sent[last - 1] if last < self.layers else 0)
        return peak + _COPIES * given

    def active_experts(self, layers: int) -> int:
        """Bytes of the experts of the first ``layers`` that one token reads."""
        return sum(
            max(experts - (weights - active), 0)
            for experts, weights, active in zip(
                self.experts[:layers], self.weights[:layers], self.active[:layers], strict=True
            )
        )

    def host_experts(self, layers: int) -> int:
        """What the head's processor computes in besides, when it keeps the experts of the first ``layers``.

        As much as for the whole of one of them: more than it is.
        """
        return max(self._demands.alone[:layers], default=0)

    def lent_experts(self, layers: int) -> int:
        """Bytes on the device that computes the rest: for long prompts it is lent the experts, one tensor
        after another, and takes the next while it uses one.
        """
        return max(
            (
                min(2 * largest, experts)
                for largest, experts in zip(self.largest, self.experts[:layers], strict=False)
            ),
            default=0,
        )

    def host_compute(self, *, devices: int, offloaded: int) -> int:
        """Compute buffer of the head's processor, its own first layers (those not offloaded) included."""
        own = max(self.layers + 1 - offloaded, 0)
        piped = devices > 1 and own == 0
        peak = max(self._demands.alone[:own], default=self._inputs.looked_up)
        if own:
            peak += self._inputs.raw * (3 if self._inputs.joins else 1) + self._inputs.front
        return peak + (_COPIES if piped else 1) * self._inputs.host


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a layer's operations need: pipelined as the first of a device, pipelined as a later one, without
    pipelining; and which inputs. ``received``, ``sent``: bytes that pass besides the hidden state when a
    device begins or ends with it. ``source``: the layer whose cache it uses, -1: its own.
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
class _Demands:
    """The demands of all layers, the output last, by kind: a planner asks for thousands of ranges.

    ``full`` to ``windowed_own``: how many layers before each one attend so, and have a cache of their own.
    ``borrowed``: pairs of a layer and the one whose cache it uses.
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

    @classmethod
    def of(cls, each: Sequence[_Demand]) -> _Demands:
        def before(flags: Iterable[bool]) -> tuple[int, ...]:
            return tuple(itertools.accumulate(flags, initial=0))

        return cls(
            first=tuple(demand.first for demand in each),
            later=tuple(demand.later for demand in each),
            alone=tuple(demand.alone for demand in each),
            received=tuple(demand.received for demand in each),
            sent=tuple(demand.sent for demand in each),
            full=before(demand.full for demand in each),
            full_own=before(demand.full and demand.source < 0 for demand in each),
            windowed=before(demand.windowed for demand in each),
            windowed_own=before(demand.windowed and demand.source < 0 for demand in each),
            borrowed=tuple((index, demand.source) for index, demand in enumerate(each) if demand.source >= 0),
        )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Bytes of what each device is given for one ubatch.

    ``hidden``: the hidden state; ``chosen``: of those tokens that are output; ``full``, ``windowed``: masks
    of attention; ``indices``: where in a cache new rows go; ``always``: positions and the like;
    ``per_layer``, ``raw``: the embedding of a layer's own, of all layers together; ``front``: what the
    first block's device holds besides; ``joins``: the output's
    device needs that too; ``begins``, ``ends``: what making several streams of one takes, and one of
    several; ``host``: what the head keeps of all inputs; ``looked_up``: what the head computes of them.
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
    ends: int
    host: int
    looked_up: int

    def of_all(self, needs: _Demands, first: int, last: int) -> int:
        """Inputs that layers have in common."""
        total = self.always
        if needs.full[last] > needs.full[first]:
            total += self.full + self.indices * (needs.full_own[last] > needs.full_own[first])
        if needs.windowed[last] > needs.windowed[first]:
            total += self.windowed + self.indices * (needs.windowed_own[last] > needs.windowed_own[first])
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
    kinds = _kinds(shape)
    known: dict[tuple[object, ...], _Demand] = {}
    for index, layer in enumerate(shape.layers):
        rows = cells.windowed if layer.window else cells.full
        v = layer.v if flash or not layer.v else widest_v
        kv = rows * cells.streams * (type_k.row(layer.k) + type_v.row(v))
        state.append(kv + layer.recurrent * run.slots)
        # Most layers are alike, and stand between such that are.
        alike = (*kinds[max(index - 1, 0) : index + 2], layer.window, layer.source, not index, index == last)
        if alike not in known:
            known[alike] = _demand(shape, index, cells, run, flash, index == last)
        demands.append(known[alike])
    demands.append(_output_demand(shape, cells))
    snapshots = tuple(
        snapshot(shape, layer, run, cells.windowed if layer.window else 0) for layer in shape.layers
    )
    kept = checkpoints(shape, run, sum(snapshots))
    logits = (shape.n_vocab * shape.cached + shape.n_embd) * cells.outputs * 4
    return Footprint(
        layers=len(shape.layers),
        weights=(*(layer.weights for layer in shape.layers), shape.output),
        state=tuple(state),
        active=(*(layer.active for layer in shape.layers), shape.output),
        host_weights=shape.host_weights + shape.projector,
        projector=shape.projector,
        host_buffers=logits + _TOKEN * shape.n_vocab + kept * run.slots * sum(snapshots),
        checkpoints=kept,
        results=logits,
        tied=shape.tied,
        snapshots=snapshots,
        largest_tensor=shape.largest_tensor,
        largest=(*(layer.largest for layer in shape.layers), shape.largest_output),
        experts=tuple(layer.experts for layer in shape.layers),
        n_embd=shape.n_embd,
        n_vocab=shape.n_vocab,
        context_train=shape.context_train,
        estimate=not shape.known,
        slots=run.slots,
        _demands=_Demands.of(demands),
        _inputs=_inputs(shape, run, cells, flash, widest_v),
    )


def _kinds(shape: Shape) -> list[int]:
    """A number for each layer: that of its block."""
    numbers: dict[Block | None, int] = {}
    return [numbers.setdefault(layer.block, len(numbers)) for layer in shape.layers]


@dataclass(frozen=True, slots=True)
class _Cells:
    """The sizes of a run: cells of the caches of one stream, streams, tokens and outputs of a ubatch."""

    full: int
    windowed: int
    streams: int
    tokens: int
    outputs: int
    sequences: int
    cached: bool

    def seen(self, window: bool) -> int:
        """Tokens that one token's attention looks at."""
        if not self.cached:
            return self.tokens
        return self.windowed if window else self.full

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
        return cls(full, windowed, streams, tokens, outputs, run.slots, shape.cached)


def _demand(shape: Shape, index: int, cells: _Cells, run: Run, flash: bool, last: bool) -> _Demand:
    layer = shape.layers[index]
    if layer.block is None:
        return _Demand(0, 0, 0)
    block = layer.block
    batch = Batch(
        tokens=cells.tokens,
        outputs=cells.outputs,
        sequences=cells.sequences,
        cells=cells.seen(layer.window),
        flash=flash,
        rotate_k=run.type_k not in _UNPACKED and block.head_k % 64 == 0,
        rotate_v=run.type_v not in _UNPACKED and block.head_v % 64 == 0,
    )
    attends = bool(block.q)
    # Without flash attention the scores leave a hole beside which the hidden state comes to lie.
    states = shape.slack if flash or block.fused else max(shape.slack, block.streams)
    slack = states * shape.n_embd * cells.tokens * 4
    return _Demand(
        first=slack + _peak(block, batch, True, True, last),
        later=slack + _peak(block, batch, True, False, last),
        alone=slack + _peak(block, batch, False, True, last),
        full=attends and not layer.window,
        windowed=attends and layer.window,
        received=_received(shape, index, cells),
        sent=_sent(shape, index, cells),
        source=layer.source,
    )


def _received(shape: Shape, index: int, cells: _Cells) -> int:
    """What a device that begins with a layer is given of the one before, besides the hidden state.

    Recurrent layers fetch their state before the layer before has ended, which moves the border between the
    devices a little: parts of products pass where one hidden state was meant to. Measured, not derived.
    """
    block = shape.layers[index].block
    unit = cells.tokens * 4
    if block is None or (index == 0 and not shape.positions):
        return 0
    if index == 0:
        return shape.n_embd * unit
    before = shape.layers[index - 1].block
    if before is not None and (_scans(block) or block.mixer == "conv"):
        if _scans(block) and _scans(before) and not before.experts:
            return (block.inner + block.convolved) * unit
        return shape.n_embd * unit if before.experts and not before.ff_shared else 0
    if block.mixer.startswith("rwkv"):
        return shape.n_embd * unit * 5 // 2
    return 0


def _sent(shape: Shape, index: int, cells: _Cells) -> int:
    """What comes back to a device that ends with a layer; see `_received`."""
    block = shape.layers[index].block
    if block is None:
        return 0
    after = shape.layers[index + 1].block if index + 1 < len(shape.layers) else None
    if after is not None and _scans(block) and _scans(after) and not block.experts:
        return block.inner * cells.tokens * 4
    return shape.n_embd * cells.tokens * 4 if block.mixer.startswith("rwkv") else 0


def _scans(block: Block) -> bool:
    """Whether a state-space scan stands in attention's place."""
    return block.mixer in ("mamba", "mamba2") and not block.q


@functools.lru_cache(maxsize=4096)
def _peak(block: Block, batch: Batch, piped: bool, first: bool, last: bool) -> int:
    return blocks.peak(block, batch, piped=piped, first=first, last=last)


def _output_demand(shape: Shape, cells: _Cells) -> _Demand:
    """The output norm and the logits; the hidden state is there beside them. Embedders have no logits."""
    if not shape.cached:
        normed = 2 * shape.n_embd * cells.tokens * 4 if shape.output else 0
        return _Demand(normed, normed, normed)
    hidden, logits = shape.n_embd * cells.outputs * 4, shape.n_vocab * cells.outputs * 4
    if _late(shape):
        hidden += shape.n_embd * cells.tokens * 4
    return _Demand(hidden + logits, 2 * hidden + logits, 2 * hidden + logits)


def _late(shape: Shape) -> bool:
    """Whether outputs are chosen only after the last block."""
    return any(layer.block is not None and layer.block.late for layer in shape.layers)


def _inputs(shape: Shape, run: Run, cells: _Cells, flash: bool, widest_v: int) -> _Inputs:
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
    positions = 4 * tokens * (4 if shape.architecture in _FOURFOLD else 1)
    # Lightning attention is told how much each token counts for each other, head by head.
    always = positions + 4 * cells.outputs + lightning * tokens * tokens * 4
    per_layer = shape.per_layer * tokens * 4
    raw = per_layer * sum(layer.block is not None for layer in shape.layers)
    several = streams > 1
    return _Inputs(
        # Of several streams one, all of them turned, and all of them pass (Gemma 3n).
        hidden=hidden * (2 * streams + 1) if several else hidden,
        chosen=hidden if _late(shape) else shape.n_embd * cells.outputs * 4 * (shape.output > 0),
        full=full,
        windowed=windowed,
        indices=indices,
        always=always,
        per_layer=per_layer,
        raw=raw,
        front=shape.front * hidden,
        joins=raw + hidden if several else 0,
        begins=4 * streams * hidden if several else 0,
        ends=2 * (streams + 1) * hidden if several else 0,
        host=hidden + 4 * tokens + always + masks,
        looked_up=hidden * (2 if shape.positions else 1) + raw,
    )


def _rotations(shape: Shape, run: Run) -> int:
    """Bytes of the matrices that turn the rows of a quantized cache."""
    total = 0
    blocks_with_heads = [layer.block for layer in shape.layers if layer.block and layer.block.q]
    for kind, size in (
        (run.type_k, max((block.head_k for block in blocks_with_heads), default=0)),
        (run.type_v, max((block.head_v for block in blocks_with_heads), default=0)),
    ):
        if kind not in _UNPACKED and size and size % 64 == 0:
            total += 4 * (size & -size) ** 2
    return total


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
