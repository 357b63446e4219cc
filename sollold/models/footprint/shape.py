"""What of a model's header its memory depends on: small enough to be sent to the node that plans.

`sollold.models.footprint.read_shape` reads it from a header.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.block import Block

ALIGNMENT = 128
"""Tensors begin at multiples of this in a device's buffer: CUDA's; the processor's 32 is smaller."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model.

    Attributes:
        weights: bytes of its tensors, each padded to the buffer's alignment.
        active: bytes of them that one token reads: of experts only those used.
        k, v: elements of a row of its K and V cache, 0 when it has none.
        window: its attention slides over ``Shape.window`` tokens only.
        recurrent: bytes of recurrent state a sequence.
        block: what is computed in it; None: nothing (a layer for next-token prediction that is not used).
        source: the layer whose cache it uses; -1: its own, or none.
        largest: bytes of its largest tensor.
        experts: bytes of the weights of its experts, of ``weights``: they can stay with the head's processor.
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
    """The last layer, which predicts the token after the next one, as it is when llama.cpp drafts by it.

    Attributes:
        embeds: it has a token embedding of its own; ``norms``, ``heads``: an output norm, an output matrix.
        read: bytes that a drafted token reads, of the output matrix too where it has none.
    """

    layer: Layer
    embeds: bool
    norms: bool
    heads: bool
    read: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as far as its memory goes.

    Attributes:
        known: the architecture is in the table; otherwise everything is estimated on the safe side.
        output: bytes of the output group (output matrix, output norm), a second copy of the token
            embedding included when the output is tied to it.
        host_weights: bytes that stay with the head's processor (token embedding and the like).
        tied: of ``output`` that second copy, where the head's processor can do without; 0: it has a matrix of
            its own.
        largest_tensor: bytes of it: while loading, so much is held once more. ``largest_output``: of the
            output group's.
        n_embd, n_vocab: elements of a hidden state, tokens of the vocabulary.
        window: tokens of the sliding window; 0: none.
        context_train: tokens of the context it was trained with.
        parameters: count of weights.
        cached: has a cache or a recurrent state: without one it gives embeddings only.
        per_layer: elements of the embedding that each layer has of its own (Gemma 3n and 4).
        positions: places have an embedding beside that of tokens.
        projector: bytes of the projector and of what it computes in; 0: the model has none.
        slack, front: hidden states to add to every compute buffer, and to that of the device that begins
            (see `sollold.models.footprint.architectures`).
        predicting: None: llama.cpp can't draft by a layer of its own.
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
        """Whether outputs are chosen only after the last block."""
        return any(layer.block is not None and layer.block.late for layer in self.layers)

    @property
    def windowed(self) -> bool:
        """Whether some layers' attention slides over a window."""
        return self.window > 0 and any(layer.window for layer in self.layers)


def padded(size: int) -> int:
    """Bytes that a tensor takes in a device's buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT
