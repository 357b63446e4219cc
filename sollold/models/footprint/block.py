"""What a block of a model computes, and for how many tokens at once."""

from __future__ import annotations

from sollold.facts import dataclass

FLOAT = 4
"""Bytes of an element of everything that is computed."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one block computes: widths in elements of a token; 0 where it has no such part.

    Attributes:
        embd: hidden state.
        q, k, v: what attention computes for new tokens; ``out``: its result before the output matrix.
        heads: attention heads; ``head_k``, ``head_v``: elements of one.
        fused: query, key and value come of one matrix; ``query_gate``: the query has a gate beside it,
            ``out_gate``: attention's result has one; ``reshaped``: query and key cannot be turned in place.
        latent, rope, q_rank: of multi-head latent attention. ``indexer``: width of the queries that choose
            the tokens that it looks at; ``chosen``: how many.
        mixer: what there is instead of or besides attention: ``mamba``, ``mamba2``, ``delta``, ``kda``,
            ``lightning``, ``conv``, ``rwkv6``, ``rwkv7``; or empty.
        inner, steps, projected, convolved: of the mixer: its width, that of its time steps, what it projects
            to, what it convolves; ``repeats``: keys are repeated to the width of values.
        mixer_state, conv_state: elements a sequence.
        ff, gated, wide: feed-forward layer; with a gate; the gate in the same matrix.
        experts, used, ff_expert, ff_shared: of a mixture of experts; ``latent_expert``: width they work at.
        parallel: attention and feed-forward start from the same norm: ``early`` or ``late``, by which is
            added first, attention or the hidden state.
        late: outputs are chosen only after the last block.
        onto: attention and feed-forward are added to the hidden state, not it to them.
        followed: all of its operations are followed in order; those of others were fitted to measurements.
        after: norms follow attention and feed-forward; ``bare``: there is none before attention.
        cached: attention has a cache.
        choice: experts are chosen by more than their weight; ``expert_first``: weights come before them.
        streams, per_layer: hidden states carried at once (AltUp), embedding of its own (Gemma).
    """

    embd: int
    q: int = 0
    k: int = 0
    v: int = 0
    out: int = 0
    heads: int = 0
    head_k: int = 0
    head_v: int = 0
    fused: bool = False
    query_gate: bool = False
    reshaped: bool = False
    out_gate: bool = False
    latent: int = 0
    rope: int = 0
    q_rank: int = 0
    indexer: int = 0
    chosen: int = 0
    mixer: str = ""
    inner: int = 0
    steps: int = 0
    repeats: bool = False
    projected: int = 0
    convolved: int = 0
    mixer_state: int = 0
    conv_state: int = 0
    ff: int = 0
    gated: bool = True
    wide: bool = False
    experts: int = 0
    used: int = 0
    ff_expert: int = 0
    ff_shared: int = 0
    expert_gated: bool = True
    expert_first: bool = False
    choice: bool = False
    latent_expert: int = 0
    parallel: str = ""
    late: bool = False
    after: bool = False
    onto: bool = False
    followed: bool = False
    bare: bool = False
    cached: bool = True
    streams: int = 1
    per_layer: int = 0

    def passed(self, tokens: int) -> tuple[int, int]:
        """Bytes of what follows the next block's state to its device, and of what comes back.

        Where that state is fetched before this block has ended.
        """
        if self.q:
            return self.out * tokens * FLOAT, self.out * tokens * FLOAT
        # The gate is a part of what was projected.
        return ((tokens - 1) * self.projected + self.inner) * FLOAT, self.inner * tokens * FLOAT


@dataclass(frozen=True, slots=True)
class Batch:
    """What is computed at once.

    ``tokens``: of the ubatch; ``outputs``: those whose result is wanted; ``sequences``: slots; ``cells``:
    of the cache over all streams, as far as one token sees them; ``flash``: flash attention; ``rotate_k``,
    ``rotate_v``: the cache is quantized and its rows are rotated; ``kept``: states that recurrent blocks keep
    besides the last, to go back by so many tokens. ``mask``: the operation that gives the mask, where its
    room may be used again; -1: the mask lies before everything.
    """

    tokens: int
    outputs: int
    sequences: int
    cells: int
    flash: bool
    rotate_k: bool = False
    rotate_v: bool = False
    kept: int = 0
    mask: int = -1
