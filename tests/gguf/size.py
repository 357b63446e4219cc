"""Dimensions of test models, and tensors common to many architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sollold.models.gguf.writer import MetadataValue

Metadata = dict[str, MetadataValue]
Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a model. Those that an architecture does not have are ignored.

    Attributes:
        head: elements of an attention head; 0: ``embd // heads``.
        nextn: number of final layers for next-token prediction.
        more: metadata that replaces the architecture's own.
    """

    layers: int = 4
    embd: int = 256
    heads: int = 4
    heads_kv: int = 2
    head: int = 0
    ff: int = 512
    vocab: int = 512
    context: int = 8192
    experts: int = 4
    experts_used: int = 2
    ff_expert: int = 128
    window: int = 512
    nextn: int = 0
    tied: bool = False
    more: Metadata = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        return self.head or self.embd // self.heads

    @property
    def q(self) -> int:
        return self.head_size * self.heads

    @property
    def kv(self) -> int:
        return self.head_size * self.heads_kv


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: its name in GGUF files, its metadata (without the prefix) and its tensors."""

    name: str
    metadata: Callable[[Size], Metadata]
    tensors: Callable[[Size], Tensors]


def common(size: Size) -> Metadata:
    metadata: Metadata = {
        "block_count": size.layers,
        "context_length": size.context,
        "embedding_length": size.embd,
        "feed_forward_length": size.ff,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.heads_kv,
        "attention.key_length": size.head_size,
        "attention.value_length": size.head_size,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": size.head_size,
        "vocab_size": size.vocab,
    }
    if size.nextn:
        metadata["nextn_predict_layers"] = size.nextn
    return metadata


def moe(size: Size) -> Metadata:
    return common(size) | {
        "expert_count": size.experts,
        "expert_used_count": size.experts_used,
        "expert_feed_forward_length": size.ff_expert,
    }


def ends(size: Size, *, bias: bool = False, tied: bool = False) -> Tensors:
    """The token embedding, the output norm, and the output unless it is tied."""
    yield "token_embd.weight", (size.embd, size.vocab)
    yield "output_norm.weight", (size.embd,)
    if bias:
        yield "output_norm.bias", (size.embd,)
    if not (size.tied or tied):
        yield "output.weight", (size.embd, size.vocab)


def vectors(size: Size, block: int, *names: str, bias: bool = False) -> Tensors:
    """Tensors with one number per element of the hidden state, such as norms."""
    for name in names:
        yield f"blk.{block}.{name}.weight", (size.embd,)
        if bias:
            yield f"blk.{block}.{name}.bias", (size.embd,)


def attention(
    size: Size,
    block: int,
    *,
    bias: bool = False,
    fused: bool = False,
    norm: bool = False,
    wide: int = 1,
    out_bias: bool = False,
) -> Tensors:
    """Query, key, value and output. ``wide``: 2 if the query's matrix also contains a gate."""
    if fused:
        yield f"blk.{block}.attn_qkv.weight", (size.embd, size.q + 2 * size.kv)
        if bias:
            yield f"blk.{block}.attn_qkv.bias", (size.q + 2 * size.kv,)
    else:
        for name, width in (("q", size.q * wide), ("k", size.kv), ("v", size.kv)):
            yield f"blk.{block}.attn_{name}.weight", (size.embd, width)
            if bias:
                yield f"blk.{block}.attn_{name}.bias", (width,)
    if norm:
        yield f"blk.{block}.attn_q_norm.weight", (size.head_size,)
        yield f"blk.{block}.attn_k_norm.weight", (size.head_size,)
    yield f"blk.{block}.attn_output.weight", (size.q, size.embd)
    if out_bias:
        yield f"blk.{block}.attn_output.bias", (size.embd,)


def feed_forward(
    size: Size, block: int, hidden: int = 0, *, suffix: str = "", gate: bool = True, bias: bool = False
) -> Tensors:
    hidden = hidden or size.ff
    if gate:
        yield f"blk.{block}.ffn_gate{suffix}.weight", (size.embd, hidden)
    yield f"blk.{block}.ffn_up{suffix}.weight", (size.embd, hidden)
    yield f"blk.{block}.ffn_down{suffix}.weight", (hidden, size.embd)
    if bias:
        yield f"blk.{block}.ffn_up{suffix}.bias", (hidden,)
        yield f"blk.{block}.ffn_down{suffix}.bias", (size.embd,)


def experts(
    size: Size, block: int, hidden: int = 0, *, gate: bool = True, bias: bool = False, choice: bool = False
) -> Tensors:
    """The experts and their router. ``choice``: with a bias of the router."""
    hidden = hidden or size.ff_expert
    yield f"blk.{block}.ffn_gate_inp.weight", (size.embd, size.experts)
    names = ("gate", "up") if gate else ("up",)
    for name in names:
        yield f"blk.{block}.ffn_{name}_exps.weight", (size.embd, hidden, size.experts)
    yield f"blk.{block}.ffn_down_exps.weight", (hidden, size.embd, size.experts)
    if bias:
        yield f"blk.{block}.ffn_gate_inp.bias", (size.experts,)
        for name in names:
            yield f"blk.{block}.ffn_{name}_exps.bias", (hidden, size.experts)
        yield f"blk.{block}.ffn_down_exps.bias", (size.embd, size.experts)
    if choice:
        yield f"blk.{block}.exp_probs_b.bias", (size.experts,)


def predicts(size: Size, block: int) -> bool:
    """Whether a block is for next-token prediction."""
    return block >= size.layers - size.nextn


def predicting(size: Size, block: int) -> Tensors:
    """The additional tensors of a block for next-token prediction."""
    if predicts(size, block):
        yield f"blk.{block}.nextn.eh_proj.weight", (2 * size.embd, size.embd)
        yield from vectors(size, block, "nextn.enorm", "nextn.hnorm")


def shared(size: Size, block: int, *, gate: bool = True, chosen: bool = False) -> Tensors:
    """The shared expert. ``chosen``: with a gate."""
    yield from feed_forward(size, block, size.ff_expert, suffix="_shexp", gate=gate)
    if chosen:
        yield f"blk.{block}.ffn_gate_inp_shexp.weight", (size.embd,)
