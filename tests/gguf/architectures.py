"""What a GGUF file of each architecture holds: its metadata and tensors, after llama.cpp's loaders.

Every function gives the metadata (without the architecture's prefix) and the tensors of a model of a `Size`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sollold.models.gguf_writer import MetadataValue

Metadata = dict[str, MetadataValue]
Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Size:
    """How big a model is made. What does not apply to an architecture is ignored.

    ``more``: metadata that replaces what the architecture's function would say.
    """

    layers: int = 4
    embd: int = 256
    heads: int = 4
    heads_kv: int = 2
    ff: int = 512
    vocab: int = 512
    context: int = 8192
    experts: int = 4
    experts_used: int = 2
    ff_expert: int = 128
    window: int = 512
    tied: bool = False
    more: Metadata = field(default_factory=dict)

    @property
    def head(self) -> int:
        return self.embd // self.heads


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: its name in files, and what its files hold."""

    name: str
    metadata: Callable[[Size], Metadata]
    tensors: Callable[[Size], Tensors]


def common(size: Size) -> Metadata:
    return {
        "block_count": size.layers,
        "context_length": size.context,
        "embedding_length": size.embd,
        "feed_forward_length": size.ff,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.heads_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": size.head,
        "vocab_size": size.vocab,
    }


def moe(size: Size) -> Metadata:
    return common(size) | {"expert_count": size.experts, "expert_used_count": size.experts_used}


def ends(size: Size) -> Tensors:
    """Token embedding, output norm, and the output where it is not tied."""
    yield "token_embd.weight", (size.embd, size.vocab)
    yield "output_norm.weight", (size.embd,)
    if not size.tied:
        yield "output.weight", (size.embd, size.vocab)


def norms(size: Size, block: int, *names: str) -> Tensors:
    for name in names:
        yield f"blk.{block}.{name}.weight", (size.embd,)


def attention(size: Size, block: int) -> Tensors:
    yield f"blk.{block}.attn_q.weight", (size.embd, size.head * size.heads)
    yield f"blk.{block}.attn_k.weight", (size.embd, size.head * size.heads_kv)
    yield f"blk.{block}.attn_v.weight", (size.embd, size.head * size.heads_kv)
    yield f"blk.{block}.attn_output.weight", (size.head * size.heads, size.embd)


def gated(size: Size, block: int, hidden: int = 0, suffix: str = "") -> Tensors:
    """A feed-forward layer with gate, up and down."""
    hidden = hidden or size.ff
    yield f"blk.{block}.ffn_gate{suffix}.weight", (size.embd, hidden)
    yield f"blk.{block}.ffn_up{suffix}.weight", (size.embd, hidden)
    yield f"blk.{block}.ffn_down{suffix}.weight", (hidden, size.embd)


def experts(size: Size, block: int, hidden: int = 0) -> Tensors:
    hidden = hidden or size.ff_expert
    yield f"blk.{block}.ffn_gate_inp.weight", (size.embd, size.experts)
    yield f"blk.{block}.ffn_gate_exps.weight", (size.embd, hidden, size.experts)
    yield f"blk.{block}.ffn_up_exps.weight", (size.embd, hidden, size.experts)
    yield f"blk.{block}.ffn_down_exps.weight", (hidden, size.embd, size.experts)


def llama(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from norms(size, block, "attn_norm", "ffn_norm")
        yield from attention(size, block)
        yield from gated(size, block)


def mixtral(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from norms(size, block, "attn_norm", "ffn_norm")
        yield from attention(size, block)
        yield from experts(size, block, size.ff)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", common, llama),
    "mixtral": Architecture("llama", moe, mixtral),
}
