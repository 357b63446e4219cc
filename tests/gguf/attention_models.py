"""Architectures with attention and feed-forward in every layer, according to llama.cpp's loaders."""

from __future__ import annotations

from collections.abc import Callable

from sollold.models.gguf.writer import MetadataValue
from tests.gguf.size import (
    Architecture,
    Metadata,
    Size,
    Tensors,
    attention,
    common,
    ends,
    experts,
    feed_forward,
    moe,
    predicting,
    shared,
    vectors,
)

_PAIR = ("attn_norm", "ffn_norm")
_FOUR = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def plain(
    *,
    norms: tuple[str, ...] = _PAIR,
    norm_bias: bool = False,
    bias: bool = False,
    fused: bool = False,
    qk_norm: bool = False,
    out_bias: bool = False,
    gate: bool = True,
    up: int = 1,
    ffn_bias: bool = False,
    tied: bool = False,
    output_bias: bool = False,
) -> Callable[[Size], Tensors]:
    """The tensors of a dense transformer. ``up``: 2 if the up matrix also contains the gate."""

    def tensors(size: Size) -> Tensors:
        yield from ends(size, bias=norm_bias, tied=tied)
        if output_bias:
            yield "output.bias", (size.vocab,)
        for block in range(size.layers):
            yield from vectors(size, block, *norms, bias=norm_bias)
            yield from attention(size, block, bias=bias, fused=fused, norm=qk_norm, out_bias=out_bias)
            if up == 2:
                yield f"blk.{block}.ffn_up.weight", (size.embd, 2 * size.ff)
                yield f"blk.{block}.ffn_down.weight", (size.ff, size.embd)
            else:
                yield from feed_forward(size, block, gate=gate, bias=ffn_bias)

    return tensors


def sparse(
    *,
    norms: tuple[str, ...] = _PAIR,
    norm_bias: bool = False,
    bias: bool = False,
    qk_norm: bool = False,
    out_bias: bool = False,
    wide_experts: bool = False,
    expert_bias: bool = False,
    choice: bool = False,
    common_expert: bool = False,
    chosen: bool = False,
    dense_lead: int = 0,
    dense_every: int = 0,
    sinks: bool = False,
    output_bias: bool = False,
) -> Callable[[Size], Tensors]:
    """The tensors of a transformer with experts; the first ``dense_lead`` layers have none."""

    def tensors(size: Size) -> Tensors:
        yield from ends(size, bias=norm_bias)
        if output_bias:
            yield "output.bias", (size.vocab,)
        for block in range(size.layers):
            yield from vectors(size, block, *norms, bias=norm_bias)
            yield from attention(size, block, bias=bias, norm=qk_norm, out_bias=out_bias)
            if sinks:
                yield f"blk.{block}.attn_sinks.weight", (size.heads,)
            if block < dense_lead or (dense_every and (block + 1) % dense_every):
                yield from feed_forward(size, block)
                continue
            hidden = size.ff if wide_experts else size.ff_expert
            yield from experts(size, block, hidden, bias=expert_bias, choice=choice)
            if common_expert:
                yield from shared(size, block, chosen=chosen)
            yield from predicting(size, block)

    return tensors


def with_keys(base: Callable[[Size], Metadata], **keys: MetadataValue) -> Callable[[Size], Metadata]:
    """``base`` with further keys; ``__`` in a keyword means a dot."""
    return lambda size: base(size) | {key.replace("__", "."): value for key, value in keys.items()}


def windowed(base: Callable[[Size], Metadata], pattern: int = 0) -> Callable[[Size], Metadata]:
    """Attention over a sliding window, with every ``pattern``-th layer full."""

    def metadata(size: Size) -> Metadata:
        keys = base(size) | {"attention.sliding_window": size.window}
        if pattern:
            keys["attention.sliding_window_pattern"] = [
                (block + 1) % pattern != 0 for block in range(size.layers)
            ]
        return keys

    return metadata


def _vision(base: Callable[[Size], Metadata]) -> Callable[[Size], Metadata]:
    """``base`` with four positions per token."""
    return lambda size: base(size) | {"rope.dimension_sections": [8, 12, 12, 0]}


def whole_norms(base: Callable[[Size], Tensors]) -> Callable[[Size], Tensors]:
    """``base`` with norms over all heads of queries and keys instead of per head."""

    def tensors(size: Size) -> Tensors:
        for name, shape in base(size):
            yield name, {"attn_q_norm": (size.q,), "attn_k_norm": (size.kv,)}.get(name.split(".")[-2], shape)

    return tensors


def _gemma4_moe(size: Size) -> Metadata:
    keys = (
        _gemma4(size) | moe(size) | {"attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0}
    )
    return {**keys, "attention.key_length": 2 * size.head_size, "attention.value_length": 2 * size.head_size}


def _gemma4_moe_tensors(size: Size) -> Tensors:
    yield from ends(size, tied=True)
    yield "rope_freqs.weight", (size.head_size,)
    for block in range(size.layers):
        head = size.head_size * (1 if (block + 1) % 4 else 2)
        yield from vectors(size, block, *_FOUR, "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
        for name, heads in (("q", size.heads), ("k", size.heads_kv), ("v", size.heads_kv)):
            yield f"blk.{block}.attn_{name}.weight", (size.embd, head * heads)
        yield f"blk.{block}.attn_q_norm.weight", (head,)
        yield f"blk.{block}.attn_k_norm.weight", (head,)
        yield f"blk.{block}.attn_output.weight", (head * size.heads, size.embd)
        yield from feed_forward(size, block)
        yield f"blk.{block}.ffn_gate_inp.weight", (size.embd, size.experts)
        yield f"blk.{block}.ffn_gate_inp.scale", (size.embd,)
        yield f"blk.{block}.ffn_gate_up_exps.weight", (size.embd, 2 * size.ff_expert, size.experts)
        yield f"blk.{block}.ffn_down_exps.weight", (size.ff_expert, size.embd, size.experts)


_LATENT, _ROPE, _NOPE, _VALUE = 64, 32, 32, 32


def mla(size: Size) -> Metadata:
    return moe(size) | {
        "attention.head_count_kv": 1,
        "attention.key_length": _LATENT + _ROPE,
        "attention.value_length": _LATENT,
        "attention.key_length_mla": _NOPE + _ROPE,
        "attention.value_length_mla": _VALUE,
        "attention.q_lora_rank": 96,
        "attention.kv_lora_rank": _LATENT,
        "rope.dimension_count": _ROPE,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }


def mla_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, *_PAIR)
        yield f"blk.{block}.attn_q_a_norm.weight", (96,)
        yield f"blk.{block}.attn_kv_a_norm.weight", (_LATENT,)
        yield f"blk.{block}.attn_q_a.weight", (size.embd, 96)
        yield f"blk.{block}.attn_q_b.weight", (96, size.heads * (_NOPE + _ROPE))
        yield f"blk.{block}.attn_kv_a_mqa.weight", (size.embd, _LATENT + _ROPE)
        yield f"blk.{block}.attn_k_b.weight", (_NOPE, _LATENT, size.heads)
        yield f"blk.{block}.attn_v_b.weight", (_LATENT, _VALUE, size.heads)
        yield f"blk.{block}.attn_output.weight", (size.heads * _VALUE, size.embd)
        if block == 0:
            yield from feed_forward(size, block)
        else:
            yield from experts(size, block, choice=True)
            yield from shared(size, block)
        yield from predicting(size, block)


def _gemma3n(size: Size) -> Metadata:
    return windowed(common, 5)(size)


def _gemma3n_tensors(size: Size) -> Tensors:
    yield from ends(size, tied=True)
    yield "altup_proj.weight", (size.embd, size.embd, 3)
    yield "altup_unembd_proj.weight", (size.embd, size.embd, 3)
    yield from _per_layer(size, 256)
    for block in range(size.layers):
        yield from vectors(size, block, *_FOUR)
        yield from attention(size, block, norm=True)
        yield from feed_forward(size, block)
        yield from _per_layer_block(size, block, 256)
        yield f"blk.{block}.altup_correct_coef.weight", (4, 4)
        yield f"blk.{block}.altup_correct_scale.weight", (size.embd,)
        yield f"blk.{block}.altup_predict_coef.weight", (4, 16)
        yield f"blk.{block}.altup_router.weight", (size.embd, 4)
        yield f"blk.{block}.altup_router_norm.weight", (size.embd,)
        yield f"blk.{block}.laurel_l.weight", (size.embd, 64)
        yield f"blk.{block}.laurel_r.weight", (64, size.embd)
        yield f"blk.{block}.laurel_post_norm.weight", (size.embd,)


def _per_layer(size: Size, width: int) -> Tensors:
    yield "per_layer_token_embd.weight", (width * size.layers, size.vocab)
    yield "per_layer_model_proj.weight", (size.embd, width * size.layers)
    yield "per_layer_proj_norm.weight", (width,)


def _per_layer_block(size: Size, block: int, width: int) -> Tensors:
    yield f"blk.{block}.inp_gate.weight", (size.embd, width)
    yield f"blk.{block}.proj.weight", (width, size.embd)
    yield f"blk.{block}.post_norm.weight", (size.embd,)


_GEMMA4_WIDTH = 64


def _gemma4_shared(size: Size) -> int:
    """The number of final layers without their own cache; the last layer with one has full attention."""
    return size.layers // 8 * 4


def _gemma4(size: Size) -> Metadata:
    return windowed(common, 4)(size) | {
        "attention.key_length_swa": size.head_size,
        "attention.value_length_swa": size.head_size,
        "attention.key_length": 2 * size.head_size,
        "attention.value_length": 2 * size.head_size,
        "attention.shared_kv_layers": _gemma4_shared(size),
        "embedding_length_per_layer_input": _GEMMA4_WIDTH,
        "rope.dimension_count": 2 * size.head_size,
        "rope.dimension_count_swa": size.head_size,
    }


def _gemma4_tensors(size: Size) -> Tensors:
    yield from ends(size, tied=True)
    yield from _per_layer(size, _GEMMA4_WIDTH)
    yield "rope_freqs.weight", (size.head_size,)
    for block in range(size.layers):
        head = size.head_size * (1 if (block + 1) % 4 else 2)
        yield from vectors(size, block, *_FOUR)
        yield f"blk.{block}.attn_q.weight", (size.embd, head * size.heads)
        if block < size.layers - _gemma4_shared(size):
            yield f"blk.{block}.attn_k.weight", (size.embd, head * size.heads_kv)
            yield f"blk.{block}.attn_v.weight", (size.embd, head * size.heads_kv)
            yield f"blk.{block}.attn_k_norm.weight", (head,)
        yield f"blk.{block}.attn_q_norm.weight", (head,)
        yield f"blk.{block}.attn_output.weight", (head * size.heads, size.embd)
        yield from feed_forward(size, block)
        yield from _per_layer_block(size, block, _GEMMA4_WIDTH)
        yield f"blk.{block}.layer_output_scale.weight", (1,)


def _bert(size: Size) -> Metadata:
    return common(size) | {
        "attention.causal": False,
        "pooling_type": 1,
        "attention.head_count_kv": size.heads,
    }


def _bert_tensors(rope: bool) -> Callable[[Size], Tensors]:
    def tensors(size: Size) -> Tensors:
        yield "token_embd.weight", (size.embd, size.vocab)
        yield "token_types.weight", (size.embd, 2)
        if not rope:
            yield "position_embd.weight", (size.embd, size.context)
        yield "token_embd_norm.weight", (size.embd,)
        yield "token_embd_norm.bias", (size.embd,)
        for block in range(size.layers):
            if rope:
                yield f"blk.{block}.attn_qkv.weight", (size.embd, 3 * size.embd)
            else:
                for name in ("q", "k", "v"):
                    yield f"blk.{block}.attn_{name}.weight", (size.embd, size.embd)
                    yield f"blk.{block}.attn_{name}.bias", (size.embd,)
            yield f"blk.{block}.attn_output.weight", (size.embd, size.embd)
            if not rope:
                yield f"blk.{block}.attn_output.bias", (size.embd,)
            yield from vectors(size, block, "attn_output_norm", "layer_output_norm", bias=True)
            yield from feed_forward(size, block, gate=rope, bias=not rope)

    return tensors


def _shared_width(base: Callable[[Size], Metadata]) -> Callable[[Size], Metadata]:
    return lambda size: base(size) | {"expert_shared_feed_forward_length": size.ff_expert}


def _granite_moe(size: Size) -> Metadata:
    keys = moe(size) | {"logit_scale": 8.0, "residual_scale": 0.22, "embedding_scale": 12.0}
    del keys["expert_feed_forward_length"]
    return keys


MODELS: dict[str, Architecture] = {
    "llama": Architecture("llama", common, plain()),
    "mixtral": Architecture("llama", moe, sparse(wide_experts=True)),
    "llama4": Architecture(
        "llama4",
        with_keys(moe, interleave_moe_layer_step=2),
        sparse(common_expert=True, dense_every=2),
    ),
    "mistral3": Architecture("mistral3", common, plain()),
    "qwen2": Architecture("qwen2", common, plain(bias=True)),
    "qwen2moe": Architecture(
        "qwen2moe", _shared_width(moe), sparse(bias=True, common_expert=True, chosen=True)
    ),
    "qwen3": Architecture("qwen3", common, plain(qk_norm=True)),
    "qwen3moe": Architecture("qwen3moe", moe, sparse(qk_norm=True)),
    "gemma": Architecture("gemma", common, plain(tied=True)),
    "gemma2": Architecture("gemma2", windowed(common), plain(norms=_FOUR, tied=True)),
    "gemma3": Architecture("gemma3", windowed(common), plain(norms=_FOUR, qk_norm=True, tied=True)),
    "gemma3n": Architecture("gemma3n", _gemma3n, _gemma3n_tensors),
    "gemma4": Architecture("gemma4", _gemma4, _gemma4_tensors),
    "phi2": Architecture(
        "phi2",
        common,
        plain(
            norms=("attn_norm",),
            norm_bias=True,
            bias=True,
            out_bias=True,
            gate=False,
            ffn_bias=True,
            output_bias=True,
        ),
    ),
    "phi3": Architecture("phi3", common, plain(fused=True, up=2)),
    "phimoe": Architecture(
        "phimoe",
        moe,
        sparse(norm_bias=True, bias=True, out_bias=True, wide_experts=True, output_bias=True),
    ),
    "deepseek": Architecture(
        "deepseek",
        with_keys(moe, leading_dense_block_count=1, expert_shared_count=1, expert_weights_scale=1.0),
        sparse(common_expert=True, dense_lead=1),
    ),
    "deepseek2": Architecture("deepseek2", mla, mla_tensors),
    "gpt-oss": Architecture(
        "gpt-oss",
        windowed(moe),
        sparse(
            norms=("attn_norm", "post_attention_norm"),
            bias=True,
            out_bias=True,
            expert_bias=True,
            sinks=True,
        ),
    ),
    "command-r": Architecture(
        "command-r", with_keys(common, logit_scale=0.0625), plain(norms=("attn_norm",), tied=True)
    ),
    "cohere2": Architecture(
        "cohere2",
        windowed(with_keys(common, logit_scale=0.25)),
        plain(norms=("attn_norm",), tied=True),
    ),
    "granite": Architecture(
        "granite", with_keys(common, logit_scale=8.0, residual_scale=0.22, embedding_scale=12.0), plain()
    ),
    "granitemoe": Architecture("granitemoe", _granite_moe, sparse(wide_experts=True)),
    "glm4": Architecture("glm4", common, plain(norms=_FOUR, up=2, bias=True)),
    "glm4moe": Architecture(
        "glm4moe",
        with_keys(moe, leading_dense_block_count=1, expert_shared_count=1, expert_weights_scale=1.0),
        sparse(
            norms=("attn_norm", "post_attention_norm"),
            bias=True,
            qk_norm=True,
            choice=True,
            common_expert=True,
            dense_lead=1,
        ),
    ),
    "nemotron": Architecture("nemotron", common, plain(norm_bias=True, gate=False)),
    "bert": Architecture("bert", _bert, _bert_tensors(rope=False)),
    "nomic-bert": Architecture("nomic-bert", _bert, _bert_tensors(rope=True)),
    "olmo2": Architecture(
        "olmo2",
        windowed(common),
        whole_norms(plain(norms=("post_attention_norm", "post_ffw_norm"), qk_norm=True)),
    ),
    "exaone4": Architecture(
        "exaone4", windowed(common), plain(norms=("post_attention_norm", "post_ffw_norm"), qk_norm=True)
    ),
    "smollm3": Architecture("smollm3", common, plain()),
    "seed_oss": Architecture(
        "seed_oss", common, plain(norms=("attn_norm", "post_attention_norm"), bias=True)
    ),
    "starcoder2": Architecture(
        "starcoder2",
        common,
        plain(norm_bias=True, bias=True, out_bias=True, gate=False, ffn_bias=True),
    ),
    "qwen2vl": Architecture("qwen2vl", _vision(common), plain(bias=True)),
    "qwen3vl": Architecture("qwen3vl", _vision(common), plain(qk_norm=True)),
    "qwen3vlmoe": Architecture("qwen3vlmoe", _vision(moe), sparse(qk_norm=True)),
    "minimax-m2": Architecture(
        "minimax-m2",
        with_keys(moe, expert_gating_func=2),
        whole_norms(sparse(qk_norm=True, choice=True, wide_experts=True)),
    ),
    "hunyuan-moe": Architecture(
        "hunyuan-moe",
        _shared_width(moe),
        sparse(qk_norm=True, common_expert=True, wide_experts=True),
    ),
    "gemma4-moe": Architecture("gemma4", _gemma4_moe, _gemma4_moe_tensors),
    "gemma-embedding": Architecture(
        "gemma-embedding",
        with_keys(windowed(common), attention__causal=False, pooling_type=1),
        plain(norms=_FOUR, qk_norm=True, tied=True),
    ),
}
