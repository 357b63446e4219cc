"""Architectures that llama.cpp supports and sollold only estimates."""

from __future__ import annotations

from collections.abc import Callable

from tests.gguf.attention_models import mla, mla_tensors, sparse, windowed
from tests.gguf.further_models import shared_count
from tests.gguf.size import (
    Architecture,
    Metadata,
    Size,
    Tensors,
    attention,
    ends,
    experts,
    moe,
    vectors,
)


def _fused(base: Callable[[Size], Tensors]) -> Callable[[Size], Tensors]:
    """``base`` with query, key and value in one matrix."""

    def tensors(size: Size) -> Tensors:
        for name, shape in base(size):
            if name.endswith(".attn_q.weight"):
                yield name.replace("attn_q", "attn_qkv"), (size.embd, size.q + 2 * size.kv)
            elif not name.endswith((".attn_k.weight", ".attn_v.weight")):
                yield name, shape

    return tensors


def _indexed(size: Size) -> Metadata:
    return mla(size) | {
        "attention.indexer.head_count": 4,
        "attention.indexer.key_length": 64,
        "attention.indexer.top_k": 256,
    }


def _indexed_tensors(size: Size) -> Tensors:
    """MLA with an indexer, whose own keys select the tokens for attention."""
    yield from mla_tensors(size)
    for block in range(size.layers):
        yield f"blk.{block}.indexer.k_norm.weight", (64,)
        yield f"blk.{block}.indexer.k_norm.bias", (64,)
        yield f"blk.{block}.indexer.proj.weight", (size.embd, 4)
        yield f"blk.{block}.indexer.attn_k.weight", (size.embd, 64)
        yield f"blk.{block}.indexer.attn_q_b.weight", (96, 4 * 64)


_KDA, _KERNEL = 64, 4
_FOUR = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def _kimi(size: Size) -> Metadata:
    """Three of four layers keep a square state per head (KDA), the fourth has attention (MLA)."""
    return mla(size) | {
        "attention.head_count_kv": [0 if (block + 1) % 4 else 1 for block in range(size.layers)],
        "ssm.conv_kernel": _KERNEL,
        "kda.head_dim": _KDA,
    }


def _kimi_tensors(size: Size) -> Tensors:
    inner = size.heads * _KDA
    attends = [name for name, _ in mla_tensors(size) if ".attn_" in name and ".attn_norm" not in name]
    for name, shape in mla_tensors(size):
        block = int(name.split(".")[1]) if name.startswith("blk.") else -1
        if ".attn_q_b." in name and (block + 1) % 4 == 0:
            yield name.replace("attn_q_b", "attn_q"), (size.embd, shape[1])
        elif name not in attends or ((block + 1) % 4 == 0 and ".attn_q_a" not in name):
            yield name, shape
    for block in range(size.layers):
        if (block + 1) % 4 == 0:
            continue
        for part in ("q", "k", "v"):
            yield f"blk.{block}.attn_{part}.weight", (size.embd, inner)
            yield f"blk.{block}.ssm_conv1d_{part}.weight", (_KERNEL, 1, inner)
        yield f"blk.{block}.attn_output.weight", (inner, size.embd)
        for part in ("f", "g"):
            yield f"blk.{block}.ssm_{part}_a.weight", (size.embd, _KDA)
            yield f"blk.{block}.ssm_{part}_b.weight", (_KDA, inner)
        yield f"blk.{block}.ssm_beta.weight", (size.embd, size.heads)
        yield f"blk.{block}.ssm_a", (1, size.heads)
        yield f"blk.{block}.ssm_dt.bias", (inner,)
        yield f"blk.{block}.ssm_norm.weight", (_KDA,)


def _minimax(size: Size) -> Metadata:
    keys = moe(size) | {"residual_scale": 1.0, "full_attention_interval": 4}
    del keys["expert_feed_forward_length"]
    return keys


def _minimax_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "ffn_norm")
        if (block + 1) % 4:
            yield f"blk.{block}.attn_norm_2.weight", (size.q,)
            yield f"blk.{block}.attn_qkv.weight", (size.embd, 3 * size.q)
            yield f"blk.{block}.attn_gate.weight", (size.embd, size.q)
            yield f"blk.{block}.attn_output.weight", (size.q, size.embd)
        else:
            yield from attention(size, block)
        yield from experts(size, block, size.ff)


def _gated(base: Callable[[Size], Tensors]) -> Callable[[Size], Tensors]:
    """``base`` with a gate on the output of attention."""

    def tensors(size: Size) -> Tensors:
        for name, shape in base(size):
            yield name, shape
            if name.endswith(".attn_output.weight"):
                yield name.replace("attn_output", "attn_gate"), (size.embd, size.q)

    return tensors


MODELS: dict[str, Architecture] = {
    "afmoe": Architecture(
        "afmoe",
        windowed(shared_count(moe)),
        _gated(sparse(norms=_FOUR, qk_norm=True, choice=True, common_expert=True, dense_lead=1)),
    ),
    "bailingmoe2": Architecture(
        "bailingmoe2",
        shared_count(moe),
        _fused(sparse(qk_norm=True, choice=True, common_expert=True, dense_lead=1)),
    ),
    "deepseek32": Architecture("deepseek32", _indexed, _indexed_tensors),
    "kimi-linear": Architecture("kimi-linear", _kimi, _kimi_tensors),
    "minimax-01": Architecture("minimax-01", _minimax, _minimax_tensors),
}
