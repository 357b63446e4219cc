"""What of a model's header its memory depends on: small enough to be sent to the node that plans.

`shape_of` reads the metadata as llama.cpp's ``load_hparams`` and each architecture's loader do; what differs
between architectures stands as data in `sollold.models.architectures`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sollold.models.gguf import Header, Tensor

ALIGNMENT = 128
"""Tensors begin at multiples of this in a device's buffer: CUDA's; the processor's 32 is smaller."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model.

    Attributes:
        weights: bytes of its tensors, each padded to the buffer's alignment.
        active: bytes of them that one token reads: of experts only those used.
        heads: attention heads; ``k``, ``v``: elements of a row of its K and V cache, 0 when it has none.
        window: its attention slides over ``Shape.window`` tokens only.
        recurrent: bytes of recurrent state a sequence.
        width: most elements a token has in flight while the layer is computed, without attention scores.
    """

    weights: int
    active: int
    heads: int = 0
    k: int = 0
    v: int = 0
    window: bool = False
    recurrent: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as far as its memory goes.

    Attributes:
        known: the architecture is in the table; otherwise everything is estimated on the safe side.
        output: bytes of the output group (output matrix, output norm), a second copy of the token
            embedding included when the output is tied to it.
        host_weights: bytes that stay with the head's processor (token embedding and the like).
        largest_tensor: bytes of it: while loading, so much is held once more.
        n_embd, n_vocab: elements of a hidden state, tokens of the vocabulary.
        window: tokens of the sliding window; 0: none.
        context_train: tokens of the context it was trained with.
        parameters: count of weights.
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


def shape_of(header: Header) -> Shape:
    """The shape of a model by its header. Never fails for a header that could be read."""
    arch = header.architecture
    count = max(header.integer(f"{arch}.block_count"), 1)
    n_embd = header.integer(f"{arch}.embedding_length")
    heads = _per_layer(header, f"{arch}.attention.head_count", count, 0)
    heads_kv = _per_layer(header, f"{arch}.attention.head_count_kv", count, heads)
    ff = _per_layer(header, f"{arch}.feed_forward_length", count, 0)
    weights, active = [0] * count, [0] * count
    output = host = 0
    tied = 0
    for tensor in header.tensors:
        size = padded(tensor.size)
        index = block(tensor)
        if index is not None and index < count:
            weights[index] += size
            active[index] += size
        elif tensor.name.startswith("output"):
            output += size
        else:
            host += size
            if tensor.name == "token_embd.weight":
                tied = size
    if not any(tensor.name == "output.weight" for tensor in header.tensors):
        output += tied
    layers = []
    for index in range(count):
        head = n_embd // max(heads[index], 1)
        k = header.integer(f"{arch}.attention.key_length", head) * heads_kv[index]
        v = header.integer(f"{arch}.attention.value_length", head) * heads_kv[index]
        layers.append(
            Layer(weights[index], active[index], heads[index], k, v, width=2 * n_embd + 2 * ff[index])
        )
    return Shape(
        architecture=arch,
        known=arch == "llama",
        layers=tuple(layers),
        output=output,
        host_weights=host,
        largest_tensor=max((tensor.size for tensor in header.tensors), default=0),
        n_embd=n_embd,
        n_vocab=header.integer(f"{arch}.vocab_size") or header.length("tokenizer.ggml.tokens"),
        context_train=header.integer(f"{arch}.context_length"),
        parameters=sum(tensor.elements for tensor in header.tensors),
    )


def padded(size: int) -> int:
    """Bytes that a tensor takes in a device's buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block(tensor: Tensor) -> int | None:
    """The block that a tensor belongs to (``blk.7.attn_q.weight``: 7); None when it belongs to none."""
    parts = tensor.name.split(".", 2)
    if parts[0] == "blk" and len(parts) == 3 and parts[1].isascii() and parts[1].isdigit():
        return int(parts[1][:9])
    return None


def _per_layer(header: Header, key: str, count: int, default: int | tuple[int, ...]) -> tuple[int, ...]:
    values = header.integers(key)
    if len(values) == 1:
        return values * count
    if len(values) >= count:
        return values[:count]
    return default if isinstance(default, tuple) else (default,) * count
