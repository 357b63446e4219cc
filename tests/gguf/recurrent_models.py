"""Architectures with recurrent layers, with or without attention, according to llama.cpp's loaders."""

from __future__ import annotations

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
    predicts,
    shared,
    vectors,
)

_CONV, _GROUPS = 4, 1


def _inner(size: Size) -> int:
    return 2 * size.embd


def _ssm(size: Size, state: int, rank: int) -> Metadata:
    return {
        "ssm.conv_kernel": _CONV,
        "ssm.inner_size": _inner(size),
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
        "ssm.group_count": _GROUPS,
    }


def _mamba1_block(size: Size, block: int, *, norms: bool = False) -> Tensors:
    state, rank, inner = 16, size.embd // 16, _inner(size)
    yield f"blk.{block}.ssm_in.weight", (size.embd, 2 * inner)
    yield f"blk.{block}.ssm_conv1d.weight", (_CONV, inner)
    yield f"blk.{block}.ssm_conv1d.bias", (inner,)
    yield f"blk.{block}.ssm_x.weight", (inner, rank + 2 * state)
    yield f"blk.{block}.ssm_dt.weight", (rank, inner)
    yield f"blk.{block}.ssm_dt.bias", (inner,)
    yield f"blk.{block}.ssm_a", (state, inner)
    yield f"blk.{block}.ssm_d", (inner,)
    yield f"blk.{block}.ssm_out.weight", (inner, size.embd)
    if norms:
        yield f"blk.{block}.ssm_dt_norm.weight", (rank,)
        yield f"blk.{block}.ssm_b_norm.weight", (state,)
        yield f"blk.{block}.ssm_c_norm.weight", (state,)


def _mamba2_heads(size: Size) -> int:
    return _inner(size) // 64


def _mamba2_block(size: Size, block: int) -> Tensors:
    state, inner, heads = 64, _inner(size), _mamba2_heads(size)
    convolved = inner + 2 * _GROUPS * state
    yield f"blk.{block}.ssm_in.weight", (size.embd, inner + convolved + heads)
    yield f"blk.{block}.ssm_conv1d.weight", (_CONV, convolved)
    yield f"blk.{block}.ssm_conv1d.bias", (convolved,)
    yield f"blk.{block}.ssm_dt.bias", (heads,)
    yield f"blk.{block}.ssm_a", (1, heads)
    yield f"blk.{block}.ssm_d", (1, heads)
    yield f"blk.{block}.ssm_norm.weight", (inner // _GROUPS, _GROUPS)
    yield f"blk.{block}.ssm_out.weight", (inner, size.embd)


def _without_heads(size: Size) -> Metadata:
    return common(size) | {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}


def _mamba(size: Size) -> Metadata:
    return _without_heads(size) | _ssm(size, 16, size.embd // 16)


def _mamba_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm")
        yield from _mamba1_block(size, block)


def _mamba2(size: Size) -> Metadata:
    return _without_heads(size) | _ssm(size, 64, _mamba2_heads(size))


def _mamba2_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm")
        yield from _mamba2_block(size, block)


def _attends(block: int) -> bool:
    """Whether a layer of a hybrid is an attention layer: every fourth is."""
    return block % 4 == 2


def _hybrid_heads(size: Size) -> Metadata:
    return {"attention.head_count_kv": [size.heads_kv * _attends(block) for block in range(size.layers)]}


def _jamba(size: Size) -> Metadata:
    return moe(size) | _ssm(size, 16, size.embd // 16) | _hybrid_heads(size)


def _jamba_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "ffn_norm")
        if _attends(block):
            yield from attention(size, block)
        else:
            yield from _mamba1_block(size, block, norms=True)
        if block % 2:
            yield from experts(size, block, size.ff)
        else:
            yield from feed_forward(size, block)


def _granite_hybrid(size: Size) -> Metadata:
    keys = moe(size) | _ssm(size, 64, _mamba2_heads(size)) | _hybrid_heads(size)
    return keys | {"expert_shared_feed_forward_length": size.ff_expert, "logit_scale": 8.0}


def _granite_hybrid_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "ffn_norm")
        yield from attention(size, block) if _attends(block) else _mamba2_block(size, block)
        yield from experts(size, block, size.ff)
        yield from shared(size, block)


def _falcon_h1(size: Size) -> Metadata:
    return common(size) | _ssm(size, 64, _mamba2_heads(size))


def _falcon_h1_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm")
        yield f"blk.{block}.ffn_norm", (size.embd,)
        yield from attention(size, block)
        yield from _mamba2_block(size, block)
        yield from feed_forward(size, block)


def _nemotron_h(size: Size) -> Metadata:
    keys = common(size) | _ssm(size, 64, _mamba2_heads(size))
    keys["attention.head_count_kv"] = [size.heads_kv * (block % 4 == 2) for block in range(size.layers)]
    keys["feed_forward_length"] = [size.ff * (block % 2) for block in range(size.layers)]
    return keys


def _nemotron_h_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm")
        if block % 2:
            yield from feed_forward(size, block, gate=False)
        elif block % 4 == 2:
            yield from attention(size, block)
        else:
            yield from _mamba2_block(size, block)


def _qwen35(size: Size) -> Metadata:
    heads = _inner(size) // 64
    return common(size) | {
        "ssm.conv_kernel": _CONV,
        "ssm.inner_size": _inner(size),
        "ssm.state_size": 64,
        "ssm.time_step_rank": heads,
        "ssm.group_count": heads // 2,
        "full_attention_interval": 4,
        "rope.dimension_sections": [8, 8, 8, 0],
    }


def _delta_block(size: Size, block: int) -> Tensors:
    heads = _inner(size) // 64
    value, key = _inner(size), 64 * (heads // 2)
    yield f"blk.{block}.attn_qkv.weight", (size.embd, 2 * key + value)
    yield f"blk.{block}.attn_gate.weight", (size.embd, value)
    yield f"blk.{block}.ssm_conv1d.weight", (_CONV, 2 * key + value)
    yield f"blk.{block}.ssm_dt.bias", (heads,)
    yield f"blk.{block}.ssm_a", (heads,)
    yield f"blk.{block}.ssm_norm.weight", (64,)
    yield f"blk.{block}.ssm_out.weight", (value, size.embd)


def _qwen35_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "post_attention_norm")
        if (block + 1) % 4 == 0 or predicts(size, block):
            yield from attention(size, block, norm=True, wide=2)
        else:
            yield from _delta_block(size, block)
            for name in ("ssm_beta", "ssm_alpha"):
                yield f"blk.{block}.{name}.weight", (size.embd, _inner(size) // 64)
        yield from feed_forward(size, block)
        yield from predicting(size, block)


def _qwen3next(size: Size) -> Metadata:
    return moe(size) | _qwen35(size) | {"expert_shared_feed_forward_length": size.ff_expert}


def _qwen3next_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "post_attention_norm")
        if (block + 1) % 4 == 0:
            yield from attention(size, block, norm=True, wide=2)
        else:
            yield from _delta_block(size, block)
            yield f"blk.{block}.ssm_ba.weight", (size.embd, 2 * (_inner(size) // 64))
        yield from experts(size, block)
        yield from shared(size, block, chosen=True)


def _qwen35moe_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "post_attention_norm")
        if (block + 1) % 4 == 0 or predicts(size, block):
            yield from attention(size, block, norm=True, wide=2)
        else:
            yield from _delta_block(size, block)
            for name in ("ssm_beta", "ssm_alpha"):
                yield f"blk.{block}.{name}.weight", (size.embd, _inner(size) // 64)
        yield from experts(size, block)
        yield from shared(size, block, chosen=True)
        yield from predicting(size, block)


def _lfm2moe(size: Size) -> Metadata:
    return moe(size) | _lfm2(size) | {"leading_dense_block_count": 1, "expert_gating_func": 2}


def _lfm2moe_tensors(size: Size) -> Tensors:
    for name, shape in _lfm2_tensors(size):
        if name.startswith("blk.") and not name.startswith("blk.0.") and ".ffn_gate" in name:
            yield from experts(size, int(name.split(".")[1]), choice=True)
        elif (
            not (name.startswith("blk.") and not name.startswith("blk.0.") and ".ffn_" in name)
            or "norm" in name
        ):
            yield name, shape


def _nemotron_h_moe(size: Size) -> Metadata:
    return _nemotron_h(size) | {
        "expert_count": size.experts,
        "expert_used_count": size.experts_used,
        "expert_feed_forward_length": size.ff_expert,
        "expert_shared_feed_forward_length": size.ff_expert,
        "expert_shared_count": 1,
    }


def _nemotron_h_moe_tensors(size: Size) -> Tensors:
    yield from ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm")
        if block % 2:
            yield from experts(size, block, gate=False, choice=True)
            yield from shared(size, block, gate=False)
        elif block % 4 == 2:
            yield from attention(size, block)
        else:
            yield from _mamba2_block(size, block)


def _lfm2(size: Size) -> Metadata:
    return common(size) | _hybrid_heads(size) | {"shortconv.l_cache": 3}


def _lfm2_tensors(size: Size) -> Tensors:
    yield "token_embd.weight", (size.embd, size.vocab)
    yield "token_embd_norm.weight", (size.embd,)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "ffn_norm")
        if _attends(block):
            yield from attention(size, block, norm=True)
        else:
            yield f"blk.{block}.shortconv.conv.weight", (3, size.embd)
            yield f"blk.{block}.shortconv.in_proj.weight", (size.embd, 3 * size.embd)
            yield f"blk.{block}.shortconv.out_proj.weight", (size.embd, size.embd)
        yield from feed_forward(size, block)


def _rwkv6(size: Size) -> Metadata:
    return _without_heads(size) | {
        "feed_forward_length": size.ff,
        "wkv.head_size": 64,
        "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 64,
        "rescale_every_n_layers": 6,
    }


def _rwkv_ends(size: Size) -> Tensors:
    yield from ends(size, bias=True)
    yield "token_embd_norm.weight", (size.embd,)
    yield "token_embd_norm.bias", (size.embd,)


def _rwkv_square(size: Size, block: int, *names: str) -> Tensors:
    for name in names:
        yield f"blk.{block}.{name}.weight", (size.embd, size.embd)


def _rwkv6_tensors(size: Size) -> Tensors:
    embd = size.embd
    yield from _rwkv_ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "attn_norm_2", "time_mix_ln", bias=True)
        yield f"blk.{block}.time_mix_w1.weight", (embd, 160)
        yield f"blk.{block}.time_mix_w2.weight", (32, embd, 5)
        yield f"blk.{block}.time_mix_lerp_x.weight", (embd, 1, 1)
        yield f"blk.{block}.time_mix_lerp_fused.weight", (embd, 1, 1, 5)
        yield f"blk.{block}.time_mix_first.weight", (64, embd // 64)
        yield f"blk.{block}.time_mix_decay.weight", (embd,)
        yield f"blk.{block}.time_mix_decay_w1.weight", (embd, 64)
        yield f"blk.{block}.time_mix_decay_w2.weight", (64, embd)
        yield from _rwkv_square(
            size,
            block,
            "time_mix_key",
            "time_mix_value",
            "time_mix_receptance",
            "time_mix_gate",
            "time_mix_output",
            "channel_mix_receptance",
        )
        yield f"blk.{block}.channel_mix_lerp_k.weight", (embd, 1, 1)
        yield f"blk.{block}.channel_mix_lerp_r.weight", (embd, 1, 1)
        yield f"blk.{block}.channel_mix_key.weight", (embd, size.ff)
        yield f"blk.{block}.channel_mix_value.weight", (size.ff, embd)


def _rwkv7(size: Size) -> Metadata:
    return _without_heads(size) | {
        "feed_forward_length": size.ff,
        "wkv.head_size": 64,
        "attention.decay_lora_rank": 64,
        "attention.iclr_lora_rank": 64,
        "attention.value_residual_mix_lora_rank": 32,
        "attention.gate_lora_rank": 128,
    }


def _rwkv7_tensors(size: Size) -> Tensors:
    embd = size.embd
    yield from _rwkv_ends(size)
    for block in range(size.layers):
        yield from vectors(size, block, "attn_norm", "attn_norm_2", "time_mix_ln", bias=True)
        for name, rank in (("w", 64), ("a", 64), ("v", 32 if block else 64)):
            yield f"blk.{block}.time_mix_{name}0.weight", (embd,)
            yield f"blk.{block}.time_mix_{name}1.weight", (embd, rank)
            yield f"blk.{block}.time_mix_{name}2.weight", (rank, embd)
        yield f"blk.{block}.time_mix_g1.weight", (embd, 128)
        yield f"blk.{block}.time_mix_g2.weight", (128, embd)
        yield f"blk.{block}.time_mix_lerp_fused.weight", (embd, 1, 1, 6)
        yield from vectors(size, block, "time_mix_k_k", "time_mix_k_a", "time_mix_r_k")
        yield from _rwkv_square(
            size, block, "time_mix_key", "time_mix_value", "time_mix_receptance", "time_mix_output"
        )
        yield f"blk.{block}.channel_mix_lerp_k.weight", (embd, 1, 1)
        yield f"blk.{block}.channel_mix_key.weight", (embd, size.ff)
        yield f"blk.{block}.channel_mix_value.weight", (size.ff, embd)


MODELS: dict[str, Architecture] = {
    "mamba": Architecture("mamba", _mamba, _mamba_tensors),
    "mamba2": Architecture("mamba2", _mamba2, _mamba2_tensors),
    "jamba": Architecture("jamba", _jamba, _jamba_tensors),
    "granitehybrid": Architecture("granitehybrid", _granite_hybrid, _granite_hybrid_tensors),
    "falcon-h1": Architecture("falcon-h1", _falcon_h1, _falcon_h1_tensors),
    "nemotron_h": Architecture("nemotron_h", _nemotron_h, _nemotron_h_tensors),
    "qwen35": Architecture("qwen35", _qwen35, _qwen35_tensors),
    "qwen3next": Architecture("qwen3next", _qwen3next, _qwen3next_tensors),
    "qwen35moe": Architecture("qwen35moe", _qwen3next, _qwen35moe_tensors),
    "nemotron_h_moe": Architecture("nemotron_h_moe", _nemotron_h_moe, _nemotron_h_moe_tensors),
    "lfm2moe": Architecture("lfm2moe", _lfm2moe, _lfm2moe_tensors),
    "lfm2": Architecture("lfm2", _lfm2, _lfm2_tensors),
    "rwkv6": Architecture("rwkv6", _rwkv6, _rwkv6_tensors),
    "rwkv7": Architecture("rwkv7", _rwkv7, _rwkv7_tensors),
}
