"""How many bytes each layer of a model takes on a device, before anything is loaded.

The formulas are llama.cpp's own: ``llama_kv_cache``, ``llama_memory_recurrent`` and, for compute buffers, the
graph allocator's rules applied to each block (`sollold.models.footprint.block_graph`).
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.checkpoints import checkpoints, snapshot
from sollold.models.footprint.compute_buffer import Demands, demands
from sollold.models.footprint.inputs import Inputs, inputs
from sollold.models.footprint.predicting import SecondContext, loaded
from sollold.models.footprint.run_options import Cells, Run
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.tensor_types import by_name

_COPIES = 4
"""Copies of a device's inputs when batches are pipelined (GGML_SCHED_MAX_COPIES)."""

_TOKEN = 400
"""Bytes of llama-server's memory for each token that it knows: its text, its place in tables, the merges that
make it. Measured: 170 with none, 390 with two merges a token."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model run in one way.

    Layers are counted as everywhere: 0 to L - 1 the blocks, L the output group.

    Attributes:
        architecture: the model's, as its file names it.
        layers: L.
        weights: L + 1 entries, the last the output group with its norm.
        state: L entries: KV cache and recurrent state.
        active: L + 1 entries: bytes that one token reads (of experts only those used).
        host_weights: on the head's processor whatever is offloaded (token embedding), the projector included.
        projector: what of that is on a GPU of the head's instead, where one holds layers.
        host_buffers: on the head's processor besides: logits and the like, the vocabulary, the checkpoints.
        checkpoints: copies of its state that each slot may keep (`sollold.models.footprint.checkpoints`).
        snapshots: L entries: bytes of each layer in one of them.
        results: of ``host_buffers`` what is read off for each token: logits or embeddings.
        tied: of the output's weights, a second copy of the token embedding.
        largest_tensor: held once more while the head loads; ``largest``: L + 1 entries, the largest of each
            layer, held once more by a worker that is sent it.
        experts: L entries: what of ``weights`` are experts, which can stay with the head's processor.
        estimate: the architecture is not known; everything is on the safe side.
        slots: requests at a time.
        recurrent: some layer keeps a recurrent state, from which no single token can be taken back.
        predicted: bytes that a token reads which the model's own layer for next-token prediction drafts;
            0: it has none that can.

    ``_lent``: L entries, what a device is given of a layer's cache that one of another device uses.
    ``_second``: where that layer drafts, the context that it does so in.
    """

    architecture: str
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
    recurrent: bool
    predicted: int
    _lent: tuple[int, ...]
    _demands: Demands
    _inputs: Inputs
    _second: SecondContext | None = None

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
        second = self._second.compute(first, last, piped=piped) if self._second is not None else 0
        return second + self._computed(first, last, offloaded, piped=piped)

    def _computed(self, first: int, last: int, offloaded: int, *, piped: bool) -> int:
        needs, inputs = self._demands, self._inputs
        given = inputs.of_all(needs, first, last)
        if first > 0:
            given += inputs.per_layer * (min(last, self.layers) - first)
        for index, source in needs.borrowed:
            if source < first <= index < last:
                given += self._lent[source]
        # The first layer's input is one of the device's inputs, which pipelining keeps.
        own = self.layers + 1 - offloaded
        peak = needs.peak(first, last, piped=piped, own=own)
        if not piped and first > own:
            # Handed over by another device, several streams leave a hole.
            peak += inputs.turned
        if first == 0:
            # What all layers have of their own is made here; pipelining keeps what it is made of.
            made = 0 if needs.opened else inputs.raw + inputs.front + inputs.holes * piped
            peak = max(peak + made, 2 * inputs.raw + inputs.begins if piped else inputs.makes)
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
        return self._demands.peak(0, layers, piped=False) if layers else 0

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
        peak = self._demands.peak(0, own, piped=False, own=own) if own else self._inputs.looked_up
        if own and not self._demands.opened:
            peak = max(peak + self._inputs.raw + self._inputs.front, self._inputs.makes)
        if own > self.layers and self._inputs.joins:
            # Where all is on one processor, several streams are joined beside what layers have of their own.
            # Measured, not derived.
            peak = max(peak, 3 * self._inputs.raw + self._inputs.joins)
        if self._second is not None:
            peak += self._second.host_compute(own=own, piped=piped)
        return peak + (_COPIES if piped else 1) * self._inputs.host


def footprint(shape: Shape, run: Run) -> Footprint:
    """The bytes of a model of this shape, run in this way.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    type_k, type_v = by_name(run.type_k), by_name(run.type_v)
    cells = Cells.of(shape, run)
    flash = run.flash != "off"
    second, predicting = None, shape.predicting
    if run.predicts and predicting is not None:
        second = SecondContext.of(shape, predicting, run, cells, flash=flash)
        shape = loaded(shape)
    widest_v = max((layer.v for layer in shape.layers), default=0)
    state, lent = [], []
    for layer in shape.layers:
        rows = cells.windowed if layer.window else cells.full
        v = layer.v if flash or not layer.v else widest_v
        kv = rows * cells.streams * (type_k.row(layer.k) + type_v.row(v))
        state.append(kv + layer.recurrent * run.slots * run.states)
        # Of the last stream no more is seen than the layer's own values.
        lent.append(kv - rows * (type_v.row(v) - type_v.row(layer.v)))
    snapshots = tuple(
        snapshot(shape, layer, run, cells.windowed if layer.window else 0) for layer in shape.layers
    )
    kept = checkpoints(shape, run, sum(snapshots))
    logits = (shape.n_vocab * shape.cached + shape.n_embd) * max(cells.outputs, run.results) * 4
    return Footprint(
        architecture=shape.architecture,
        layers=len(shape.layers),
        weights=(*(layer.weights for layer in shape.layers), shape.output),
        state=tuple(state),
        active=(*(layer.active for layer in shape.layers), shape.output),
        host_weights=shape.host_weights + shape.projector,
        projector=shape.projector,
        host_buffers=logits
        + _TOKEN * shape.n_vocab
        + kept * run.slots * sum(snapshots)
        + (second.results if second is not None else 0),
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
        recurrent=any(layer.recurrent for layer in shape.layers),
        predicted=predicting.read if predicting is not None else 0,
        _lent=tuple(lent),
        _demands=demands(shape, run, cells, flash),
        _inputs=inputs(shape, run, cells, flash, widest_v),
        _second=second,
    )
