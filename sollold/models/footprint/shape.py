"""The facts of a model's header that its memory depends on, small enough to send to the node that plans.

`sollold.models.footprint.read_shape` reads it from a header.
"""

from __future__ import annotations

from math import gcd

from sollold.facts import dataclass
from sollold.models.footprint.block import Block
from sollold.models.gguf.tensor_types import by_name

ALIGNMENT = 128
"""Alignment of tensors in a device's buffer, in bytes: CUDA's; the CPU's, 32, is smaller."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model.

    Attributes:
        weights: bytes of its tensors, each padded to the buffer's alignment.
        active: bytes of them that are read per token: of the experts only those used.
        k, v: elements of a row of its K and V cache; 0 if it has none.
        window: it attends to a window of ``Shape.window`` tokens only.
        recurrent: bytes of recurrent state per sequence.
        block: what is computed in it; None: nothing (an MTP layer that is not used).
        source: the layer whose cache it uses; -1: its own, or none.
        largest: bytes of its largest tensor.
        experts: bytes of the experts' weights within ``weights``; they can stay on the head's CPU.
    """

    weights: int
    active: int
    k: int = 0
    v: int = 0
    window: bool = False
    recurrent: int = 0
    block: Block | None = None
    source: int = -1
    largest: int = 0
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Predicting:
    """The last layer, an MTP layer (predicting the token after the next one), as llama.cpp drafts by it.

    Attributes:
        embeds: it has its own token embedding; ``norms``, ``heads``: its own output norm, output matrix.
        read: bytes read per drafted token, including the shared output if it has no output matrix.
    """

    layer: Layer
    embeds: bool
    norms: bool
    heads: bool
    read: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The facts of a model that its memory depends on.

    Attributes:
        known: the architecture is in the table; otherwise everything is estimated conservatively.
        output: bytes of the output group (output matrix, output norm), including a second copy of the token
            embedding if the output is tied to it.
        host_weights: bytes that stay on the head's CPU (token embedding and the like).
        tied: the part of ``output`` that is such a copy and is not needed on the head's CPU; 0: none.
        largest_tensor: bytes of the largest tensor, held once more while loading. ``largest_output``: the
            same for the output group.
        n_embd, n_vocab: elements of a hidden state, tokens of the vocabulary.
        window: size of the sliding window, in tokens; 0: none.
        context_train: context the model was trained with, in tokens.
        parameters: number of weights.
        cached: it has a cache or a recurrent state; without one it only gives embeddings.
        per_layer: elements of the per-layer embedding (Gemma 3n and 4).
        positions: positions have an embedding as tokens do.
        projector: bytes of the projector and its compute buffer; 0: the model has none.
        slack, front: hidden states to add to every compute buffer, and to that of the first device (see
            `sollold.models.footprint.architectures`).
        predicting: the MTP layer; None: llama.cpp can't draft by one.
    """

    architecture: str
    known: bool
    layers: tuple[Layer, ...]
    output: int
    host_weights: int
    largest_tensor: int
    n_embd: int
    n_vocab: int
    window: int = 0
    context_train: int = 0
    parameters: int = 0
    cached: bool = True
    per_layer: int = 0
    positions: bool = False
    projector: int = 0
    largest_output: int = 0
    tied: int = 0
    slack: int = 0
    front: int = 0
    predicting: Predicting | None = None

    @property
    def late(self) -> bool:
        """Whether outputs are selected only after the last block."""
        return any(layer.block is not None and layer.block.late for layer in self.layers)

    @property
    def head_size(self) -> int:
        """Greatest common divisor of the elements of all attention heads; 0: unknown, or it has none."""
        blocks = (layer.block for layer in self.layers if layer.k)
        # The cache of multi-head latent attention has no heads.
        return gcd(*(size for b in blocks if b is not None and not b.latent for size in (b.head_k, b.head_v)))

    def takes_cache(self, *types: str) -> bool:
        """Return whether llama.cpp can store heads in a KV cache of these types: in whole blocks only."""
        return not any(self.head_size % by_name(name).block for name in types)

    @property
    def windowed(self) -> bool:
        """Whether some layers attend to a window only."""
        return self.window > 0 and any(layer.window for layer in self.layers)


def padded(size: int) -> int:
    """Return the bytes that a tensor takes in a device's buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT
