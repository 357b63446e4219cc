"""Reads a block of a model from the names and shapes of its tensors."""

from __future__ import annotations

from sollold.models.footprint.block import Block
from sollold.models.footprint.hparams import Hparams
from sollold.models.gguf.header import Tensor


def block_from(facts: Hparams, index: int, tensors: list[Tensor]) -> Block:
    """Return one block, read from the names and shapes of its tensors.

    Long because a block has many fields, most of which are read in one expression.
    """
    shapes = {tensor.name.split(".", 2)[2]: tensor.shape for tensor in tensors}

    def rows(name: str) -> int:
        shape = shapes.get(f"{name}.weight", ())
        return shape[1] if len(shape) > 1 else 0

    mixer = _mixer(shapes)
    conv_state, mixer_state = states(facts, mixer)
    inner = facts.integer("ssm.inner_size")
    if mixer in ("kda", "lightning"):
        inner = rows("attn_gate") or facts.heads[0] * facts.integer("kda.head_dim", facts.head_k)
    windowed = facts.windowed[index]
    head_k = facts.head_k_swa if windowed else facts.head_k
    head_v = facts.head_v_swa if windowed else facts.head_v
    heads = facts.heads[index]
    q, k, v, fused = rows("attn_q"), rows("attn_k"), rows("attn_v"), False
    if mixer in ("kda", "lightning"):
        q = k = v = 0
    elif rows("attn_qkv") and mixer != "delta":
        fused = True
        q, k, v = heads * head_k, facts.heads_kv[index] * head_k, facts.heads_kv[index] * head_v
    out = shapes.get("attn_output.weight", (0,))[0]
    rank = rows("attn_q_a")
    if facts.latent:
        q = rows("attn_q_b") or q
    ff, up = rows("ffn_down") and shapes["ffn_down.weight"][0], rows("ffn_up")
    exps = shapes.get("ffn_down_exps.weight", ())
    if mixer.startswith("rwkv"):
        ff = rows("channel_mix_key")
    return Block(
        embd=facts.embd,
        q=q,
        k=k,
        v=v or (k if q else 0),
        out=out,
        heads=heads,
        head_k=head_k,
        head_v=head_v,
        fused=fused,
        query_gate=bool(q and out and q == 2 * out),
        reshaped=facts.row.reshaped,
        onto=facts.row.onto,
        followed=facts.row.followed or facts.row.recurrent != "no",
        out_gate=not mixer and "attn_gate.weight" in shapes,
        latent=facts.latent,
        rope=facts.integer("rope.dimension_count") if facts.latent else 0,
        q_rank=rank,
        mixer=mixer,
        inner=inner,
        steps=facts.integer("ssm.time_step_rank"),
        repeats=facts.row.repeats,
        projected=rows("ssm_in"),
        convolved=3 * inner if mixer in ("kda", "lightning") else rows("ssm_conv1d"),
        mixer_state=mixer_state if mixer else 0,
        conv_state=conv_state if mixer else 0,
        ff=ff,
        gated=bool(rows("ffn_gate")) and not mixer.startswith("rwkv"),
        wide=bool(ff) and up == 2 * ff and not rows("ffn_gate"),
        experts=facts.integer("expert_count") if exps else 0,
        used=facts.used[index] if exps else 0,
        ff_expert=exps[0] if exps else 0,
        ff_shared=shapes.get("ffn_down_shexp.weight", (0,))[0],
        expert_gated="ffn_gate_exps.weight" in shapes or "ffn_gate_up_exps.weight" in shapes,
        expert_first=facts.row.expert_first,
        choice="exp_probs_b.bias" in shapes,
        latent_expert=rows("ffn_latent_down"),
        parallel=facts.row.parallel,
        late=facts.row.late,
        indexer=rows("indexer.attn_q_b"),
        chosen=facts.integer("attention.indexer.top_k") if rows("indexer.attn_q_b") else 0,
        after="attn_output_norm.weight" in shapes,
        bare="attn_norm.weight" not in shapes and not mixer,
        cached=facts.row.cache,
        streams=facts.row.streams,
        per_layer=facts.per_layer,
    )


def states(facts: Hparams, mixer: str) -> tuple[int, int]:
    """Return the elements of recurrent state per sequence: of convolution or token shift, and of the mixer.

    After llama.cpp's ``n_embd_r`` and ``n_embd_s`` (src/llama-hparams.cpp).
    """
    if mixer in ("kda", "lightning"):
        head = facts.integer("kda.head_dim", facts.head_k)
        length = facts.integer("ssm.conv_kernel", 4) - 1 if mixer == "kda" else 0
        return 3 * max(length, 0) * facts.heads[0] * head, facts.heads[0] * head * head
    head = facts.integer("wkv.head_size")
    if head:
        return facts.integer("token_shift_count", 2) * facts.embd, facts.embd * head
    short = facts.integer("shortconv.l_cache")
    if short:
        return facts.embd * (short - 1), 0
    inner, state = facts.integer("ssm.inner_size"), facts.integer("ssm.state_size")
    kernel = max(facts.integer("ssm.conv_kernel") - 1, 0)
    return kernel * (inner + 2 * facts.integer("ssm.group_count") * state), state * inner


def _mixer(shapes: dict[str, tuple[int, ...]]) -> str:
    if "ssm_conv1d_q.weight" in shapes:
        return "kda"
    if "attn_norm_2.weight" in shapes and {"attn_gate.weight", "attn_qkv.weight"} <= shapes.keys():
        return "lightning"
    if "ssm_x.weight" in shapes:
        return "mamba"
    if "ssm_conv1d.weight" in shapes:
        return "delta" if "attn_qkv.weight" in shapes or "ssm_ba.weight" in shapes else "mamba2"
    if "shortconv.conv.weight" in shapes:
        return "conv"
    if "time_mix_key.weight" in shapes:
        return "rwkv6" if "time_mix_first.weight" in shapes else "rwkv7"
    return ""
