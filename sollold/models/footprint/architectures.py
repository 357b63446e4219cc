"""Per-architecture facts that a header does not contain, one row per architecture.

After llama.cpp's src/models/*.cpp. Widths, experts, norms and the like are not here: they are read from the
tensors themselves, so that most of a new architecture is right before its row is written.
"""

from __future__ import annotations

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table.

    Attributes:
        window: whether there is a sliding window. ``none``: never, whatever the file says. ``key``: if the
            file gives its size. A number: the size if the file gives none.
        fixed: the window always has that size, whatever the file says (except 0, which means no window).
        window_blocks: only models with this many blocks have a window; 0: all.
        every: one of every n layers attends to the whole context, when the file has no pattern of its own; 0:
            none does.
        dense_first: that layer is the first of the n rather than the last.
        recurrent: which layers keep a recurrent state: ``no``, ``all``, ``kv0`` (those without KV heads),
            ``kv0ff0`` (and without feed-forward), ``interval`` (all but every n-th), ``both`` (all, and all
            attend too).
        kv_from_start: this many first layers have a cache, which the others reuse; 0: as the file says.
        cache: has a KV cache (embedders and diffusion models do not). ``idle_cache``: it is allocated though
            never used.
        parallel: attention and feed-forward start from the same norm. ``early``: attention is added to the
            feed-forward's result first; ``late``: the hidden state is.
        late: outputs are selected only after the last block.
        streams: number of hidden states carried from layer to layer.
        expert_first: expert weights are applied before the experts rather than after.
        headless: there is no output matrix, not even a tied one.
        norm_beside: the output norm is named ``token_embd_norm``.
        copied: an output tied to the token embedding is loaded before it, and is therefore a second copy even
            on the head's CPU.
        predicts: tensors that, besides ``nextn.eh_proj``, its last layer must have for llama.cpp to draft by
            it (multi-token prediction); empty: llama.cpp can't, or not in a way that was tested here.
        slack, front: number of hidden states by which the measured compute buffer exceeds the rules, on every
            device and on the first one.
        repeats: the keys of a delta net are repeated to the width of its values.
        reshaped: queries and keys are reshaped and then normed or rotated, which can't be done in place.
        onto: attention's and feed-forward's results are added to the hidden state, rather than it to them.
        followed: operations are modelled one by one in their order, and blocks in their actual sequence.
            Always so for architectures with recurrent layers. ``reshaped`` and ``onto`` are set for such
            architectures only.
    """

    window: str | int = "none"
    fixed: bool = False
    window_blocks: int = 0
    every: int = 0
    dense_first: bool = False
    recurrent: str = "no"
    kv_from_start: int = 0
    cache: bool = True
    idle_cache: bool = False
    parallel: str = ""
    late: bool = False
    streams: int = 1
    expert_first: bool = False
    headless: bool = False
    norm_beside: bool = False
    copied: bool = False
    repeats: bool = False
    reshaped: bool = False
    onto: bool = False
    followed: bool = False
    predicts: tuple[str, ...] = ()
    slack: int = 0
    front: int = 0


_PLAIN = Architecture()
_EMBEDDER = Architecture(cache=False, slack=1)
_HYBRID = Architecture(recurrent="kv0")
_RECURRENT = Architecture(recurrent="all")

ARCHITECTURES: dict[str, Architecture] = {
    # All layers attend to the whole context.
    "llama": _PLAIN,
    "mistral3": _PLAIN,
    "mistral4": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2vl": _PLAIN,
    "qwen2moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "qwen3vl": _PLAIN,
    "qwen3vlmoe": _PLAIN,
    "gemma": _PLAIN,
    "phi2": Architecture(parallel="early", slack=1),
    "phi3": _PLAIN,
    "phimoe": _PLAIN,
    "deepseek": _PLAIN,
    "deepseek2": Architecture(predicts=("attn_q_a", "attn_k_b", "ffn_gate_shexp")),
    "command-r": Architecture(parallel="late"),
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "glm4": _PLAIN,
    "glm4moe": Architecture(predicts=("attn_q", "ffn_gate_exps")),
    "nemotron": _PLAIN,
    "smollm3": _PLAIN,
    "seed_oss": _PLAIN,
    "starcoder2": _PLAIN,
    "minimax-m2": _PLAIN,
    "hunyuan-dense": _PLAIN,
    "hunyuan-moe": _PLAIN,
    "hunyuan_vl": _PLAIN,
    "olmoe": _PLAIN,
    "internlm2": _PLAIN,
    "ernie4_5": _PLAIN,
    "ernie4_5-moe": _PLAIN,
    "stablelm": _PLAIN,
    "dots1": _PLAIN,
    "exaone": _PLAIN,
    "minicpm": _PLAIN,
    "baichuan": _PLAIN,
    "xverse": _PLAIN,
    "orion": _PLAIN,
    "arcee": _PLAIN,
    "bailingmoe": _PLAIN,
    "falcon": Architecture(parallel="early"),
    # Some layers attend to a window only.
    "llama4": Architecture(window=8192, fixed=True, every=4, expert_first=True),
    "gemma2": Architecture(window=4096, every=2),
    "gemma3": Architecture(window="key", every=6),
    "gemma3n": Architecture(window="key", every=5, kv_from_start=20, late=True, streams=4, copied=True),
    "gemma4": Architecture(window="key", late=True, front=1, reshaped=True, followed=True, copied=True),
    "gpt-oss": Architecture(window="key", every=2),
    "cohere2": Architecture(window="key", every=4, parallel="late"),
    "olmo2": Architecture(window="key", every=4, slack=1),
    "mimo2": Architecture(window="key"),
    "exaone4": Architecture(window=4096, window_blocks=64, every=4, slack=1),
    # Recurrent layers, alone or mixed with others.
    "mamba": _RECURRENT,
    "mamba2": Architecture(recurrent="all"),
    "rwkv6": Architecture(recurrent="all", slack=1),
    "rwkv7": _RECURRENT,
    "jamba": Architecture(recurrent="kv0", onto=True),
    "granitehybrid": _HYBRID,
    "lfm2": Architecture(recurrent="kv0", norm_beside=True, reshaped=True, onto=True),
    "lfm2moe": Architecture(recurrent="kv0", norm_beside=True, reshaped=True, onto=True),
    "nemotron_h": Architecture(recurrent="kv0ff0", late=True),
    "nemotron_h_moe": Architecture(recurrent="kv0ff0", late=True),
    "falcon-h1": Architecture(recurrent="both", reshaped=True),
    # Its MTP layer is not used: llama.cpp can't roll back its recurrent state
    # (llm_arch_supports_rs_rollback), so all of it would be copied over the network for each draft.
    "qwen3next": Architecture(recurrent="interval", late=True, repeats=True),
    "qwen35": Architecture(recurrent="interval", late=True, predicts=("attn_q", "ffn_up")),
    "qwen35moe": Architecture(recurrent="interval", late=True, predicts=("attn_q", "ffn_gate_exps")),
    # No cache at all: text in, one vector out.
    "bert": _EMBEDDER,
    "nomic-bert": _EMBEDDER,
    "nomic-bert-moe": _EMBEDDER,
    "gemma-embedding": Architecture(window="key", every=6, cache=False, slack=1),
    "jina-bert-v2": _EMBEDDER,
    "jina-bert-v3": _EMBEDDER,
    "modern-bert": Architecture(window="key", every=3, dense_first=True, cache=False, headless=True),
    "llama-embed": Architecture(cache=False, idle_cache=True, slack=1),
}

UNKNOWN = Architecture(window="key", late=True, slack=4)
"""For an architecture without a row: the choices that need most memory. If the file gives a window, masks are
counted for it and for the whole context; every layer's cache is counted for the whole context."""
