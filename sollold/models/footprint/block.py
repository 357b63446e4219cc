"""Describes what a block of a model computes, and for how many tokens at once."""

from __future__ import annotations

from sollold.facts import dataclass

FLOAT = 4
"""Size of one element of an intermediate result, in bytes."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one block computes: widths in elements per token, 0 where it has no such part.

    Attributes:
        embd: hidden state.
        q, k, v: attention's projections for new tokens; ``out``: its result before the output matrix.
        heads: number of attention heads; ``head_k``, ``head_v``: elements of one.
        fused: query, key and value come from one matrix; ``query_gate``: the query's projection includes a
            gate, ``out_gate``: attention's result has a gate; ``reshaped``: query and key can't be rotated in
            place.
        latent, rope, q_rank: widths in multi-head latent attention. ``indexer``: width of the queries that
            choose the tokens to attend to; ``chosen``: how many tokens they choose.
        mixer: what replaces or accompanies attention: ``mamba``, ``mamba2``, ``delta``, ``kda``,
            ``lightning``, ``conv``, ``rwkv6``, ``rwkv7``; or empty.
        inner, steps, projected, convolved: the mixer's width, and the widths of its time steps, its
            projection and its convolution; ``repeats``: keys are repeated to the width of values.
        mixer_state, conv_state: elements per sequence.
        ff, gated, wide: width of the feed-forward layer; it has a gate; the gate is in the same matrix.
        experts, used, ff_expert, ff_shared: number of experts in all and per token, width of one and of the
            shared one; ``latent_expert``: width of the experts' input and output, if not ``embd``.
        parallel: attention and feed-forward start from the same norm: ``early`` or ``late``, by which is
            added first, attention or the hidden state.
        late: outputs are selected only after the last block.
        onto: attention's and feed-forward's results are added to the hidden state, rather than it to them.
        followed: its operations are modelled one by one in their order; those of other blocks were fitted to
            measurements.
        after: norms follow attention and feed-forward; ``bare``: there is none before attention.
        cached: attention has a cache.
        choice: experts are chosen by a biased weight; ``expert_first``: weights are applied before the
            experts.
        streams, per_layer: number of hidden states carried at once (AltUp); width of the per-layer embedding
            (Gemma).
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
        """Return the bytes transferred to the next block's device, and back, for the end of this block.

        Applies when the next block's state is fetched before this block has ended.
        """
        if self.q:
            return self.out * tokens * FLOAT, self.out * tokens * FLOAT
        # The gate is a view of the projection.
        return ((tokens - 1) * self.projected + self.inner) * FLOAT, self.inner * tokens * FLOAT


@dataclass(frozen=True, slots=True)
class Batch:
    """The dimensions of one computation.

    ``tokens``: size of the ubatch; ``outputs``: number of tokens whose result is wanted; ``sequences``:
    number of slots; ``cells``: cache cells that one token sees; ``flash``: flash attention is used;
    ``rotate_k``, ``rotate_v``: the cache is quantized and its rows are rotated; ``kept``: states that
    recurrent blocks keep besides the last, to roll back by as many tokens. ``mask``: the operation that
    yields the mask, if its memory may be reused; -1: the mask lies before everything.
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
