"""Further architectures with attention and feed-forward: variants of those in `attention_models`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.gguf.attention_models import mla, mla_tensors, plain, sparse, whole_norms, windowed, with_keys
from tests.gguf.size import (
    Architecture,
    Metadata,
    Size,
    Tensors,
    common,
    experts,
    feed_forward,
    moe,
    vectors,
)


def _without_grouped_heads(base: Callable[[Size], Metadata]) -> Callable[[Size], Metadata]:
    return lambda size: base(size) | {"attention.head_count_kv": size.heads}


def _tensors_without_grouped_heads(base: Callable[[Size], Tensors]) -> Callable[[Size], Tensors]:
    return lambda size: base(dataclasses.replace(size, heads_kv=size.heads))


def _embedder(size: Size) -> Metadata:
    return common(size) | {
        "attention.causal": False,
        "pooling_type": 1,
        "attention.head_count_kv": size.heads,
    }


def _bert_like(
    *, experts_every: int = 0, types: bool = True, gate: bool = False
) -> Callable[[Size], Tensors]:
    """The tensors of a BERT without a position embedding."""

    def tensors(size: Size) -> Tensors:
        yield "token_embd.weight", (size.embd, size.vocab)
        if types:
            yield "token_types.weight", (size.embd, 2)
        yield "token_embd_norm.weight", (size.embd,)
        yield "token_embd_norm.bias", (size.embd,)
        for block in range(size.layers):
            if gate:
                for name in ("q", "k", "v"):
                    yield f"blk.{block}.attn_{name}.weight", (size.embd, size.embd)
                    yield f"blk.{block}.attn_{name}.bias", (size.embd,)
            else:
                yield f"blk.{block}.attn_qkv.weight", (size.embd, 3 * size.embd)
                yield f"blk.{block}.attn_qkv.bias", (3 * size.embd,)
            yield f"blk.{block}.attn_output.weight", (size.embd, size.embd)
            yield f"blk.{block}.attn_output.bias", (size.embd,)
            yield from vectors(size, block, "attn_output_norm", "layer_output_norm", bias=True)
            if experts_every and block % experts_every == 1:
                yield from experts(size, block, size.ff, gate=False)
            elif gate:
                yield from feed_forward(size, block)
                yield f"blk.{block}.ffn_down.bias", (size.embd,)
            else:
                yield from feed_forward(size, block, gate=False, bias=True)

    return tensors


def _modern_bert_tensors(size: Size) -> Tensors:
    yield "token_embd.weight", (size.embd, size.vocab)
    yield "token_embd_norm.weight", (size.embd,)
    yield "output_norm.weight", (size.embd,)
    for block in range(size.layers):
        if block:
            yield from vectors(size, block, "attn_norm")
        yield from vectors(size, block, "ffn_norm")
        yield f"blk.{block}.attn_qkv.weight", (size.embd, 3 * size.embd)
        yield f"blk.{block}.attn_output.weight", (size.embd, size.embd)
        yield f"blk.{block}.ffn_up.weight", (size.embd, 2 * size.ff)
        yield f"blk.{block}.ffn_down.weight", (size.ff, size.embd)


def shared_count(base: Callable[[Size], Metadata]) -> Callable[[Size], Metadata]:
    return with_keys(
        base,
        leading_dense_block_count=1,
        expert_shared_count=1,
        expert_weights_scale=1.0,
        expert_gating_func=2,
    )


MODELS: dict[str, Architecture] = {
    "llama-embed": Architecture(
        "llama-embed", with_keys(common, attention__causal=False, pooling_type=1), plain()
    ),
    "jina-bert-v2": Architecture("jina-bert-v2", _embedder, _bert_like(gate=True)),
    "jina-bert-v3": Architecture("jina-bert-v3", _embedder, _bert_like()),
    "nomic-bert-moe": Architecture(
        "nomic-bert-moe",
        lambda size: (
            _embedder(size)
            | {
                "expert_count": size.experts,
                "expert_used_count": size.experts_used,
                "moe_every_n_layers": 2,
            }
        ),
        _bert_like(experts_every=2),
    ),
    "modern-bert": Architecture("modern-bert", windowed(_embedder), _modern_bert_tensors),
    "olmoe": Architecture(
        "olmoe",
        _without_grouped_heads(moe),
        _tensors_without_grouped_heads(whole_norms(sparse(qk_norm=True, wide_experts=True))),
    ),
    "internlm2": Architecture("internlm2", common, plain()),
    "ernie4_5": Architecture("ernie4_5", common, plain()),
    "ernie4_5-moe": Architecture(
        "ernie4_5-moe",
        with_keys(
            lambda size: moe(size) | {"expert_shared_feed_forward_length": size.ff_expert},
            leading_dense_block_count=1,
            interleave_moe_layer_step=1,
        ),
        sparse(choice=True, common_expert=True, dense_lead=1),
    ),
    "stablelm": Architecture("stablelm", common, plain(norm_bias=True, bias=True)),
    "falcon": Architecture(
        "falcon", common, plain(norms=("attn_norm",), norm_bias=True, fused=True, gate=False, tied=True)
    ),
    "hunyuan-dense": Architecture("hunyuan-dense", common, plain(qk_norm=True, tied=True)),
    "dots1": Architecture(
        "dots1",
        shared_count(_without_grouped_heads(moe)),
        _tensors_without_grouped_heads(sparse(qk_norm=True, choice=True, common_expert=True, dense_lead=1)),
    ),
    "exaone": Architecture("exaone", common, plain()),
    "minicpm": Architecture("minicpm", common, plain(tied=True)),
    "baichuan": Architecture("baichuan", common, plain()),
    "xverse": Architecture("xverse", common, plain()),
    "orion": Architecture("orion", common, plain(norm_bias=True)),
    "arcee": Architecture("arcee", common, plain(gate=False)),
    "bailingmoe": Architecture(
        "bailingmoe", with_keys(shared_count(moe), leading_dense_block_count=0), sparse(common_expert=True)
    ),
    "mistral4": Architecture("mistral4", mla, mla_tensors),
    "hunyuan_vl": Architecture(
        "hunyuan_vl",
        with_keys(common, rope__dimension_sections=[8, 12, 12, 0]),
        plain(qk_norm=True, tied=True),
    ),
    "mimo2": Architecture("mimo2", windowed(moe, 4), sparse(choice=True)),
}
