"""Computes how many bytes each layer of a model takes on a device, before anything is loaded.

The formulas are llama.cpp's own: ``llama_kv_cache``, ``llama_memory_recurrent`` and, for compute buffers, the
graph allocator's rules applied to each block (`sollold.models.footprint.block_graph`).
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.checkpoints import checkpoints, snapshot
from sollold.models.footprint.compute_buffer import Demands, demands
from sollold.models.footprint.inputs import Inputs, inputs
from sollold.models.footprint.predicting import SecondContext, with_mtp_layer
from sollold.models.footprint.run_options import Cells, Run
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.tensor_types import by_name

_COPIES = 4
"""Copies of a device's inputs when batches are pipelined (GGML_SCHED_MAX_COPIES)."""

_TOKEN = 400
"""Memory of llama-server per token of the vocabulary, in bytes: its text, its table entries and the merges
that make it. Measured: 170 with no merges, 390 with two merges per token."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that a model needs with given run options.

    Layers are numbered as everywhere: 0 to L - 1 are the blocks, L is the output group.

    Attributes:
        architecture: name of the architecture in the model's file.
        layers: L.
        weights: L + 1 entries; the last is the output group with its norm.
        state: L entries: KV cache and recurrent state.
        active: L + 1 entries: bytes read per token (of the experts only those used).
        host_weights: weights that are on the head's CPU whatever is offloaded (token embedding), plus the
            projector.
        projector: part of ``host_weights`` that is on one of the head's GPUs instead, if one holds layers.
        host_buffers: further memory on the head's CPU: logits and the like, the vocabulary, the checkpoints.
        checkpoints: copies of its state that each slot may keep (`sollold.models.footprint.checkpoints`).
        snapshots: L entries: bytes of each layer in one checkpoint.
        results: part of ``host_buffers`` for the results of each token: logits and embeddings.
        tied: part of the output's weights that is a second copy of the token embedding.
        largest_tensor: size of the largest tensor, held once more while the head loads; ``largest``: L + 1
            entries, the largest of each layer, held once more by a worker that receives it.
        experts: L entries: part of ``weights`` for experts, which can stay on the head's CPU.
        estimate: the architecture is unknown; all figures are conservative estimates.
        slots: maximum number of concurrent requests.
        recurrent: some layer keeps a recurrent state, from which no single token can be removed.
        head_size: as in `Shape`.
        predicted: bytes read per token drafted by the model's own MTP layer; 0: it has none that can draft.

    ``_lent``: L entries: inputs of a device, in bytes, for the cache of a layer on another device.
    ``_second``: the context of the MTP layer, if it drafts.
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
    head_size: int
    predicted: int
    _lent: tuple[int, ...]
    _demands: Demands
    _inputs: Inputs
    _second: SecondContext | None = None

    def host_tensors(self, layers: int) -> int:
        """Return the bytes of tensors on the head's CPU when it holds the first ``layers``.

        The output counts as the last layer; if the CPU holds all, a tied output needs no copy.
        """
        return self.host_weights + sum(self.weights[:layers]) - self.tied * (layers > self.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """Part of ``host_buffers`` for all checkpoints of all slots, in bytes."""
        return self.checkpoints * self.slots * sum(self.snapshots)

    def compute(self, first: int, last: int, *, devices: int, offloaded: int) -> int:
        """Return the compute buffer of a device with layers ``first`` to ``last - 1`` (L: the output).

        ``devices``: number of devices that the model is spread over; ``offloaded``: number of the L + 1
        layers that are not on the head's CPU.
        """
        if first >= last:
            return 0
        piped = devices > 1 and offloaded > self.layers
        second = self._second.compute(first, last, piped=piped) if self._second is not None else 0
        return second + self._computed(first, last, offloaded, piped=piped)

    def _computed(self, first: int, last: int, offloaded: int, *, piped: bool) -> int:
        needs, inputs = self._demands, self._inputs
        input_bytes = inputs.of_all(needs, first, last)
        if first > 0:
            input_bytes += inputs.per_layer * (min(last, self.layers) - first)
        for index, source in needs.borrowed:
            if source < first <= index < last:
                input_bytes += self._lent[source]
        # The first layer's input is one of the device's inputs, which pipelining keeps.
        own = self.layers + 1 - offloaded
        peak = needs.peak(first, last, piped=piped, own=own)
        if not piped and first > own:
            # If another device sends them, several streams leave a hole.
            peak += inputs.turned
        if first == 0:
            # The per-layer embeddings are computed here; pipelining keeps their source.
            embeddings = 0 if needs.opened else inputs.raw + inputs.front + inputs.holes * piped
            peak = max(peak + embeddings, 2 * inputs.raw + inputs.begins if piped else inputs.makes)
            input_bytes += inputs.raw * piped
        elif last > self.layers:
            peak = max(peak, inputs.joins and inputs.joins + inputs.ends * piped)
            input_bytes += inputs.joins * piped
        if not piped:
            return peak + input_bytes
        input_bytes += inputs.hidden if first < self.layers else inputs.chosen
        input_bytes += needs.received[first] + (needs.sent[last - 1] if last < self.layers else 0)
        return peak + _COPIES * input_bytes

    def active_experts(self, layers: int) -> int:
        """Return the bytes of the experts in the first ``layers`` that are read per token."""
        return sum(
            max(experts - (weights - active), 0)
            for experts, weights, active in zip(
                self.experts[:layers], self.weights[:layers], self.active[:layers], strict=True
            )
        )

    def host_experts(self, layers: int) -> int:
        """Return the extra compute buffer of the head's CPU for the experts of the first ``layers``.

        Computed for those layers as a whole, which is an overestimate.
        """
        return self._demands.peak(0, layers, piped=False) if layers else 0

    def lent_experts(self, layers: int) -> int:
        """Return the bytes that experts on the head's CPU take on the device with the rest of their layers.

        For long prompts they are copied there one tensor after another, the next one while the last is in
        use.
        """
        return max(
            (
                min(2 * largest, experts)
                for largest, experts in zip(self.largest, self.experts[:layers], strict=False)
            ),
            default=0,
        )

    def host_compute(self, *, devices: int, offloaded: int) -> int:
        """Return the compute buffer of the head's CPU, with its own first layers (those not offloaded)."""
        own = max(self.layers + 1 - offloaded, 0)
        piped = devices > 1 and own == 0
        peak = self._demands.peak(0, own, piped=False, own=own) if own else self._inputs.looked_up
        if own and not self._demands.opened:
            peak = max(peak + self._inputs.raw + self._inputs.front, self._inputs.makes)
        if own > self.layers and self._inputs.joins:
            # With everything on the CPU, the streams are joined beside the per-layer embeddings.
            # Measured, not derived.
            peak = max(peak, 3 * self._inputs.raw + self._inputs.joins)
        if self._second is not None:
            peak += self._second.host_compute(own=own, piped=piped)
        return peak + (_COPIES if piped else 1) * self._inputs.host


def footprint(shape: Shape, run: Run) -> Footprint:
    """Return the footprint of a model of this shape with these run options.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    type_k, type_v = by_name(run.type_k), by_name(run.type_v)
    cells = Cells.of(shape, run)
    flash = run.flash != "off"
    second, predicting = None, shape.predicting
    if run.predicts and predicting is not None:
        second = SecondContext.of(shape, predicting, run, cells, flash=flash)
        shape = with_mtp_layer(shape)
    widest_v = max((layer.v for layer in shape.layers), default=0)
    state, lent = [], []
    for layer in shape.layers:
        rows = cells.windowed if layer.window else cells.full
        v = layer.v if flash or not layer.v else widest_v
        kv = rows * cells.streams * (type_k.row(layer.k) + type_v.row(v))
        state.append(kv + layer.recurrent * run.slots * run.states)
        # In the last stream only the layer's own values are seen.
        lent.append(kv - rows * (type_v.row(v) - type_v.row(layer.v)))
    snapshots = tuple(
        snapshot(shape, layer, run, cells.windowed if layer.window else 0) for layer in shape.layers
    )
    count = checkpoints(shape, run, sum(snapshots))
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
        + count * run.slots * sum(snapshots)
        + (second.results if second is not None else 0),
        checkpoints=count,
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
        head_size=shape.head_size,
        predicted=predicting.read if predicting is not None else 0,
        _lent=tuple(lent),
        _demands=demands(shape, run, cells, flash),
        _inputs=inputs(shape, run, cells, flash, widest_v),
        _second=second,
    )
