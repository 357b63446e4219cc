"""Reads the shape of a model from its header."""

from __future__ import annotations

import re

from sollold.models.footprint.architectures import ARCHITECTURES, UNKNOWN
from sollold.models.footprint.hparams import Hparams
from sollold.models.footprint.read_block import block_from, states
from sollold.models.footprint.shape import Layer, Predicting, Shape, padded
from sollold.models.gguf.header import Header, Tensor

_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_FIRST = (
    "token_embd_norm.",
    "per_layer_model_proj.",
    "per_layer_proj_norm.",
    "rope_freqs.",
    "rope_factors_long.",
    "rope_factors_short.",
)
_EXPERTS = re.compile(r"\.ffn_(?:up|down|gate|gate_up)_(?:ch|)exps")
"""The tensors that llama.cpp's ``--n-cpu-moe`` treats as experts."""


def shape_of(header: Header) -> Shape:
    """Return the shape of a model from its header. Never fails for a header that could be parsed."""
    facts = Hparams(header)
    blocks, first, output, largest_output, tied, host = _grouped(facts)
    layers = [
        _layer(facts, index, blocks[index], first if index == 0 else []) for index in range(facts.trunk)
    ]
    # MTP layers are not loaded unless they draft.
    layers += [Layer(0, 0)] * (facts.count - facts.trunk)
    return Shape(
        architecture=header.architecture,
        known=header.architecture in ARCHITECTURES,
        layers=tuple(layers),
        output=output,
        host_weights=host,
        largest_tensor=max((tensor.size for tensor in header.tensors), default=0),
        largest_output=largest_output,
        tied=tied,
        n_embd=facts.embd,
        n_vocab=facts.integer("vocab_size") or header.length("tokenizer.ggml.tokens"),
        window=facts.window,
        context_train=facts.integer("context_length"),
        parameters=sum(tensor.elements for tensor in header.tensors),
        cached=facts.row.cache,
        per_layer=facts.per_layer,
        positions=any(tensor.name.startswith("position_embd.") for tensor in header.tensors),
        slack=facts.row.slack,
        front=facts.row.front,
        predicting=_predicting(facts, blocks[-1], output),
    )


def _grouped(facts: Hparams) -> tuple[list[list[Tensor]], list[Tensor], int, int, int, int]:
    """Group the tensors by where they are loaded.

    Returns:
        the tensors of each block; those loaded with the first block; the bytes of the output group, of its
        largest tensor and of its copy of the token embedding; the bytes on the head's CPU."""
    blocks: list[list[Tensor]] = [[] for _ in range(facts.count)]
    first: list[Tensor] = []
    output = largest = host = tied = 0
    own_output = False
    for tensor in facts.header.tensors:
        index = block_of(tensor)
        if index is not None and index < facts.count:
            blocks[index].append(tensor)
        elif tensor.name.startswith(_INPUT):
            host += padded(tensor.size)
            tied = padded(tensor.size) if tensor.name == "token_embd.weight" else tied
        elif tensor.name.startswith(_FIRST) and not facts.row.norm_beside:
            first.append(tensor)
        else:
            output += padded(tensor.size)
            largest = max(largest, tensor.size)
            own_output = own_output or tensor.name == "output.weight"
    # Embedders like BERT have no output matrix, and mostly no norm before it.
    if output and not own_output and not facts.row.headless:
        tied_copy = 0 if facts.row.copied else tied
        return blocks, first, output + tied, max(largest, tied), tied_copy, host
    return blocks, first, output, largest, 0, host


def block_of(tensor: Tensor) -> int | None:
    """Return the block that a tensor belongs to (``blk.7.attn_q.weight``: 7), or None."""
    parts = tensor.name.split(".", 2)
    if parts[0] == "blk" and len(parts) == 3 and parts[1].isascii() and parts[1].isdigit():
        return int(parts[1][:9])
    return None


def _layer(facts: Hparams, index: int, tensors: list[Tensor], extra: list[Tensor]) -> Layer:
    weights = sum(padded(tensor.size) for tensor in (*tensors, *extra))
    experts = facts.integer("expert_count")
    unused = 0
    if experts > 0:
        expert_bytes = sum(tensor.size for tensor in tensors if "_exps" in tensor.name)
        unused = expert_bytes - expert_bytes * min(facts.used[index], experts) // experts
    expert_weights = sum(padded(tensor.size) for tensor in tensors if _EXPERTS.search(tensor.name))
    windowed = facts.windowed[index]
    k = v = recurrent = 0
    if index >= facts.trunk or facts.attends(index):
        k = (facts.head_k_swa if windowed else facts.head_k) * facts.heads_kv[index]
        v = (facts.head_v_swa if windowed else facts.head_v) * facts.heads_kv[index]
        v = 0 if facts.latent else v
        # Sparse attention caches separate keys for its indexer (DeepSeek 3.2).
        k += max(facts.integer("attention.indexer.key_length"), 0)
    block = block_from(facts, index, tensors)
    if facts.recurrent(index) or (facts.row is UNKNOWN and block.mixer):
        recurrent = 4 * sum(states(facts, block.mixer))
    elif facts.row is UNKNOWN and not block.q:
        # An unknown way of mixing tokens; assume the largest state: at most one square per head.
        recurrent = 4 * max(sum(states(facts, mixer)) for mixer in ("", "kda", "lightning"))
    return Layer(
        weights=weights,
        active=weights - unused,
        k=k,
        v=v,
        window=windowed,
        recurrent=recurrent,
        block=block,
        source=facts.source(index),
        largest=max((tensor.size for tensor in (*tensors, *extra)), default=0),
        experts=expert_weights,
    )


def _predicting(facts: Hparams, tensors: list[Tensor], output: int) -> Predicting | None:
    """Return the last layer if llama.cpp can draft by it: the only MTP layer, with all its tensors."""
    sizes = {tensor.name.split(".", 2)[2].removesuffix(".weight"): tensor.size for tensor in tensors}
    needed = {*facts.row.predicts, "nextn.eh_proj", "nextn.enorm", "nextn.hnorm"}
    if not facts.row.predicts or facts.trunk != facts.count - 1 or not needed <= sizes.keys():
        return None
    scaled = facts.header.metadata.get(f"{facts.arch}.attention.temperature_scale")
    if "attn_q_a" in needed and (scaled or not facts.latent):
        # llama.cpp refuses models with position-dependent attention scaling, or with keys that are not
        # latent.
        return None
    layer = _layer(facts, facts.trunk, tensors, [])
    heads = "nextn.shared_head_head" in sizes
    read = layer.active - sizes.get("nextn.embed_tokens", 0) + output * (not heads)
    return Predicting(layer, "nextn.embed_tokens" in sizes, "nextn.shared_head_norm" in sizes, heads, read)
