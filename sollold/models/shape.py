"""What of a model's header its memory depends on: small enough to be sent to the node that plans.

`shape_of` reads the metadata as llama.cpp's ``load_hparams`` and each architecture's loader do; what differs
between architectures stands as data in `sollold.models.architectures`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sollold.models.architectures import ARCHITECTURES, UNKNOWN, Architecture
from sollold.models.block import Block
from sollold.models.gguf import Header, Tensor

ALIGNMENT = 128
"""Tensors begin at multiples of this in a device's buffer: CUDA's; the processor's 32 is smaller."""

_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_FIRST = (
    "token_embd_norm.",
    "per_layer_model_proj.",
    "per_layer_proj_norm.",
    "rope_freqs.",
    "rope_factors_long.",
    "rope_factors_short.",
)
_ALTUP_RANK = 256
_EXPERTS = re.compile(r"\.ffn_(?:up|down|gate|gate_up)_(?:ch|)exps")
"""What llama.cpp's ``--n-cpu-moe`` takes for experts."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model.

    Attributes:
        weights: bytes of its tensors, each padded to the buffer's alignment.
        active: bytes of them that one token reads: of experts only those used.
        k, v: elements of a row of its K and V cache, 0 when it has none.
        window: its attention slides over ``Shape.window`` tokens only.
        recurrent: bytes of recurrent state a sequence.
        block: what is computed in it; None: nothing (a layer for next-token prediction).
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
class Shape:
    """A model as far as its memory goes.

    Attributes:
        known: the architecture is in the table; otherwise everything is estimated on the safe side.
        output: bytes of the output group (output matrix, output norm), a second copy of the token
            embedding included when the output is tied to it.
        host_weights: bytes that stay with the head's processor (token embedding and the like).
        tied: of ``output`` that second copy; 0: it has a matrix of its own.
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
            (see `sollold.models.architectures`).
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

    @property
    def late(self) -> bool:
        """Whether outputs are chosen only after the last block."""
        return any(layer.block is not None and layer.block.late for layer in self.layers)


def shape_of(header: Header) -> Shape:
    """The shape of a model by its header. Never fails for a header that could be read."""
    facts = _Facts(header)
    layers, first, output, largest_output, tied, host = _grouped(facts)
    made = [_layer(facts, index, layers[index], first if index == 0 else []) for index in range(facts.count)]
    return Shape(
        architecture=header.architecture,
        known=header.architecture in ARCHITECTURES,
        layers=tuple(made),
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
    )


def padded(size: int) -> int:
    """Bytes that a tensor takes in a device's buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Facts:
    """The metadata that memory depends on, with llama.cpp's defaults."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.arch = header.architecture
        self.row: Architecture = ARCHITECTURES.get(self.arch, UNKNOWN)
        self.count = min(max(self.integer("block_count"), 1), 1024)
        self.trunk = max(self.count - max(self.integer("nextn_predict_layers"), 0), 0)
        self.embd = max(self.integer("embedding_length"), 0)
        self.heads = self.each("attention.head_count", 0)
        self.heads_kv = self.each("attention.head_count_kv", self.heads)
        self.ff = self.each("feed_forward_length", 0)
        self.used = self.each("expert_used_count", 0)
        head = self.embd // max(self.heads[0], 1)
        self.head_k = self.integer("attention.key_length", head)
        self.head_v = self.integer("attention.value_length", head)
        self.head_k_swa = self.integer("attention.key_length_swa", self.head_k)
        self.head_v_swa = self.integer("attention.value_length_swa", self.head_v)
        self.window = self._window()
        self.windowed = self._windowed()
        shared = self.integer("attention.shared_kv_layers")
        self.kv_layers = self.row.kv_from_start or self.count - max(shared, 0)
        self.per_layer = self.integer("embedding_length_per_layer_input")
        if self.row.streams > 1:
            self.per_layer = _ALTUP_RANK
        self.latent = 0
        if self.integer("attention.key_length_mla"):
            self.latent = self.integer("attention.kv_lora_rank")

    def integer(self, key: str, default: int = 0) -> int:
        return self.header.integer(f"{self.arch}.{key}", default)

    def each(self, key: str, default: int | tuple[int, ...]) -> tuple[int, ...]:
        """A number for every layer, said once or per layer."""
        values = self.header.integers(f"{self.arch}.{key}")
        if len(values) == 1:
            return values * self.count
        if len(values) >= self.count:
            return values[: self.count]
        return default if isinstance(default, tuple) else (default,) * self.count

    def _window(self) -> int:
        named = self.integer("attention.sliding_window", -1)
        if self.row.window == "none" or named == 0 or self.trunk != (self.row.window_blocks or self.trunk):
            return 0
        if isinstance(self.row.window, int):
            return self.row.window if self.row.fixed or named < 0 else named
        return max(named, 0)

    def _windowed(self) -> tuple[bool, ...]:
        if not self.window or self.row is UNKNOWN:
            return (False,) * self.count
        pattern = self.header.integers(f"{self.arch}.attention.sliding_window_pattern")
        if len(pattern) >= self.count:
            return tuple(bool(value) for value in pattern[: self.count])
        every = pattern[0] if len(pattern) == 1 else self.row.every
        if every <= 0:
            return (True,) * self.count
        full = 0 if self.row.dense_first else every - 1
        return tuple(index % every != full for index in range(self.count))

    def recurrent(self, index: int) -> bool:
        """Whether a layer keeps a recurrent state."""
        if index >= self.trunk:
            return False
        rule = self.row.recurrent
        if rule in ("all", "both"):
            return True
        if rule == "kv0":
            return self.heads_kv[index] == 0
        if rule == "kv0ff0":
            return self.heads_kv[index] == 0 and self.ff[index] == 0
        if rule == "interval":
            listed = self.header.integers(f"{self.arch}.attention.recurrent_layers")
            if len(listed) >= self.count:
                return bool(listed[index])
            return (index + 1) % max(self.integer("full_attention_interval", 4), 1) != 0
        return False

    def source(self, index: int) -> int:
        """The layer whose cache a layer uses that has none of its own; -1: there is none such."""
        if index < self.kv_layers or self.kv_layers < 2 or index >= self.trunk:
            return -1
        return self.kv_layers - (2 if self.windowed[index] else 1)

    def attends(self, index: int) -> bool:
        """Whether a layer has a KV cache of its own."""
        if index >= self.trunk or index >= self.kv_layers or not (self.row.cache or self.row.idle_cache):
            return False
        if self.row.recurrent == "all":
            return False
        if self.row.recurrent == "kv0ff0":
            return self.heads_kv[index] > 0 and self.ff[index] == 0
        return self.row.recurrent in ("no", "both") or not self.recurrent(index)


def _grouped(facts: _Facts) -> tuple[list[list[Tensor]], list[Tensor], int, int, int, int]:
    """Tensors of each block, those that go with the first; bytes of the output group, of the largest in it,
    of its copy of the token embedding; bytes of the host."""
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
    # Embedders like BERT have no output, and mostly no norm before it.
    if output and not own_output and not facts.row.headless:
        return blocks, first, output + tied, max(largest, tied), tied, host
    return blocks, first, output, largest, 0, host


def block_of(tensor: Tensor) -> int | None:
    """The block that a tensor belongs to (``blk.7.attn_q.weight``: 7); None when it belongs to none."""
    parts = tensor.name.split(".", 2)
    if parts[0] == "blk" and len(parts) == 3 and parts[1].isascii() and parts[1].isdigit():
        return int(parts[1][:9])
    return None


def _layer(facts: _Facts, index: int, tensors: list[Tensor], besides: list[Tensor]) -> Layer:
    weights = sum(padded(tensor.size) for tensor in (*tensors, *besides))
    if index >= facts.trunk:
        # Layers for next-token prediction are not loaded: nothing here predicts by them.
        return Layer(0, 0)
    experts = facts.integer("expert_count")
    unused = 0
    if experts > 0:
        many = sum(tensor.size for tensor in tensors if "_exps" in tensor.name)
        unused = many - many * min(facts.used[index], experts) // experts
    kept = sum(padded(tensor.size) for tensor in tensors if _EXPERTS.search(tensor.name))
    windowed = facts.windowed[index]
    k = v = recurrent = 0
    if facts.attends(index):
        k = (facts.head_k_swa if windowed else facts.head_k) * facts.heads_kv[index]
        v = (facts.head_v_swa if windowed else facts.head_v) * facts.heads_kv[index]
        v = 0 if facts.latent else v
        # Sparse attention keeps keys of its own to choose by (DeepSeek 3.2).
        k += max(facts.integer("attention.indexer.key_length"), 0)
    block = _block(facts, index, tensors)
    if facts.recurrent(index) or (facts.row is UNKNOWN and block.mixer):
        recurrent = 4 * sum(_states(facts, block.mixer))
    elif facts.row is UNKNOWN and not block.q:
        # It mixes tokens in a way that nobody knows here, and keeps what that needs: at most a square a head.
        recurrent = 4 * max(sum(_states(facts, mixer)) for mixer in ("", "kda", "lightning"))
    return Layer(
        weights=weights,
        active=weights - unused,
        k=k,
        v=v,
        window=windowed,
        recurrent=recurrent,
        block=block,
        source=facts.source(index),
        largest=max((tensor.size for tensor in (*tensors, *besides)), default=0),
        experts=kept,
    )


def _states(facts: _Facts, mixer: str) -> tuple[int, int]:
    """Elements of recurrent state a sequence: of the convolution or token shift, and of the mixer.

    After llama.cpp's ``n_embd_r`` and ``n_embd_s`` (src/llama-hparams.cpp).
    """
    if mixer in ("kda", "lightning"):
        head = facts.integer("kda.head_dim", facts.head_k)
        kept = facts.integer("ssm.conv_kernel", 4) - 1 if mixer == "kda" else 0
        return 3 * max(kept, 0) * facts.heads[0] * head, facts.heads[0] * head * head
    head = facts.integer("wkv.head_size")
    if head:
        return facts.integer("token_shift_count", 2) * facts.embd, facts.embd * head
    short = facts.integer("shortconv.l_cache")
    if short:
        return facts.embd * (short - 1), 0
    inner, state = facts.integer("ssm.inner_size"), facts.integer("ssm.state_size")
    kernel = max(facts.integer("ssm.conv_kernel") - 1, 0)
    return kernel * (inner + 2 * facts.integer("ssm.group_count") * state), state * inner


def _block(facts: _Facts, index: int, tensors: list[Tensor]) -> Block:
    shapes = {tensor.name.split(".", 2)[2]: tensor.shape for tensor in tensors}

    def rows(name: str) -> int:
        shape = shapes.get(f"{name}.weight", ())
        return shape[1] if len(shape) > 1 else 0

    mixer = _mixer(shapes)
    conv_state, mixer_state = _states(facts, mixer)
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
