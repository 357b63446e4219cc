"""How many bytes each layer of a model takes on a device, before anything is loaded.

The formulas are llama.cpp's own: ``llama_kv_cache``, ``llama_memory_recurrent`` and, for compute buffers,
what ggml's graph allocator keeps at the same time for one ubatch.
"""

from __future__ import annotations

from dataclasses import dataclass

from sollold.models.run import Run
from sollold.models.shape import Shape
from sollold.models.tensor_type import by_name

_COPIES = 4
"""Copies of a split's inputs when batches are pipelined (GGML_SCHED_MAX_COPIES)."""


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
    _peaks: tuple[int, ...]
    _inputs: int

    def compute(self, first: int, last: int, *, devices: int, local: bool, offloaded: int) -> int:
        """Compute buffer of a device that holds layers ``first`` to ``last - 1`` (L: the output).

        ``devices``: how many the model is spread over; ``local``: on the head's own machine;
        ``offloaded``: how many of the L + 1 layers have left the head's processor.
        """
        if first >= last:
            return 0
        copies = _COPIES if devices > 1 and offloaded > self.layers else 1
        return max(self._peaks[first:last]) + copies * self._inputs

    def host_compute(self, *, devices: int, offloaded: int) -> int:
        """Compute buffer of the head's processor, its own first layers (those not offloaded) included."""
        own = self.layers + 1 - offloaded
        copies = _COPIES if devices > 1 and own <= 0 else 1
        return max(self._peaks[:own], default=0) + copies * self._inputs


def footprint(shape: Shape, run: Run) -> Footprint:
    """The bytes of a model of this shape, run in this way.

    Raises:
        KeyError: a KV type that llama.cpp does not know.
    """
    type_k, type_v = by_name(run.type_k), by_name(run.type_v)
    context = _pad(run.context, 256)
    streams = 1 if run.unified else run.slots
    per_slot = context if run.unified else _pad(context // run.slots, 256)
    ubatch = min(run.ubatch, run.batch, context)
    windowed = min(per_slot, _pad(shape.window * (run.slots if run.unified else 1) + ubatch, 256))
    state, peaks = [], []
    for layer in shape.layers:
        cells = (windowed if layer.window else per_slot) * streams
        state.append(cells * (type_k.row(layer.k) + type_v.row(layer.v)) + layer.recurrent * run.slots)
        scores = cells * ubatch * layer.heads * 4 if run.flash == "off" else 0
        peaks.append(max(layer.width * 4 * ubatch, 2 * shape.n_embd * 4 * ubatch + scores))
    peaks.append((shape.n_embd * ubatch + (shape.n_vocab + shape.n_embd) * run.slots) * 4)
    mask = per_slot * streams * ubatch * 2
    return Footprint(
        layers=len(shape.layers),
        weights=(*(layer.weights for layer in shape.layers), shape.output),
        state=tuple(state),
        active=(*(layer.active for layer in shape.layers), shape.output),
        host_weights=shape.host_weights,
        host_buffers=shape.n_vocab * run.slots * 4,
        largest_tensor=shape.largest_tensor,
        n_embd=shape.n_embd,
        n_vocab=shape.n_vocab,
        context_train=shape.context_train,
        estimate=not shape.known,
        _peaks=tuple(peaks),
        _inputs=shape.n_embd * ubatch * 4 + mask,
    )


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
