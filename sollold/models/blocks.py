"""The operations of one block of a model, as far as they need memory.

In the order in which llama.cpp's graphs (src/llama-graph.cpp, src/models/*.cpp) compute them for one ubatch.
What is done in place (a rope, an activation, adding a bias) does not show; neither do weights and caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from sollold.models.graph import Graph

_FLOAT = 4
_ALIGNED = 128
_ROUNDS = 3
"""Blocks in a row until what they need repeats itself."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one block computes: widths in elements of a token; 0 where it has no such part.

    Attributes:
        embd: hidden state.
        q, k, v: what attention computes for new tokens; ``out``: its result before the output matrix.
        heads: attention heads; ``head_k``, ``head_v``: elements of one.
        fused: query, key and value come of one matrix; ``query_gate``: the query has a gate beside it.
        latent, rope, q_rank: of multi-head latent attention.
        mixer: what there is instead of or besides attention: ``mamba``, ``mamba2``, ``delta``, ``conv``,
            ``rwkv6``, ``rwkv7``; or empty.
        inner, projected, convolved: of the mixer: its width, what it projects to, what it convolves.
        mixer_state, conv_state: elements a sequence.
        ff, gated, wide: feed-forward layer; with a gate; the gate in the same matrix.
        experts, used, ff_expert, ff_shared: of a mixture of experts; ``latent_expert``: width they work at.
        parallel: attention and feed-forward start from the same norm.
        late: outputs are chosen only after the last block.
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
    latent: int = 0
    rope: int = 0
    q_rank: int = 0
    mixer: str = ""
    inner: int = 0
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
    parallel: bool = False
    late: bool = False
    streams: int = 1
    per_layer: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """What is computed at once.

    ``tokens``: of the ubatch; ``outputs``: those whose result is wanted; ``sequences``: slots; ``cells``:
    of the cache over all streams, as far as one token sees them; ``flash``: flash attention; ``rotate_k``,
    ``rotate_v``: the cache is quantized and its rows are rotated.
    """

    tokens: int
    outputs: int
    sequences: int
    cells: int
    flash: bool
    rotate_k: bool = False
    rotate_v: bool = False


def peak(block: Block, batch: Batch, *, piped: bool, first: bool, last: bool) -> int:
    """Bytes that a block needs at most, besides what its device is given.

    ``piped``: batches follow each other through the devices; then the inputs lie before everything and are
    never freed. ``first``: it is the first block of its device. ``last``: it is the last of the model.
    """
    graph = Graph()
    size = block.embd * block.streams * batch.tokens * _FLOAT
    state = graph.add(size, kept=piped and first)
    given = 0
    if not piped:
        # The first hidden state lies before the other inputs and leaves a hole there.
        given = graph.add(_FLOAT, kept=True) and _ALIGNED
    elif first:
        given = size
    rounds = 1 if last else _ROUNDS
    for _ in range(rounds):
        state = _block(graph, block, batch, state, last=last and not block.late)
    return graph.peak() - given


def _block(graph: Graph, block: Block, batch: Batch, state: int, *, last: bool) -> int:
    tokens = batch.tokens
    hidden = block.embd * tokens * _FLOAT
    x = state
    if block.streams > 1:
        predictions = _predictions(graph, block, hidden, state)
        x = predictions
    normed = graph.add(hidden, x)
    laurel = graph.add(hidden, normed) if block.streams > 1 else None
    parts = []
    if block.mixer:
        parts.append(_mixer(graph, block, batch, normed))
    if block.latent:
        parts.append(_latent_attention(graph, block, batch, normed))
    elif block.q:
        parts.append(_attention(graph, block, batch, normed))
    wanted = tokens
    if last:
        wanted = batch.outputs
        hidden = block.embd * wanted * _FLOAT
        parts = [graph.add(hidden, part) for part in parts]
        x = graph.add(hidden, x)
        if block.parallel:
            normed = graph.add(hidden, normed)
    if block.parallel and parts:
        done = _feed_forward(graph, block, wanted, normed)
        done = graph.add(hidden, done, x, inplace=True)
        for part in parts:
            done = graph.add(hidden, done, part, inplace=True)
        return done
    done = x
    for part in parts:
        done = graph.add(hidden, part, done, inplace=True)
    if laurel is not None:
        done = graph.add(hidden, done, laurel, inplace=True)
    if block.ff or block.experts or block.mixer.startswith("rwkv"):
        second = graph.add(hidden, done) if parts else normed
        done = graph.add(hidden, _feed_forward(graph, block, wanted, second), done, inplace=True)
    if block.streams > 1:
        done = _corrected(graph, block, hidden, predictions, done)
    elif block.per_layer:
        gate = graph.add(block.per_layer * wanted * _FLOAT, done)
        done = graph.add(hidden, graph.add(hidden, gate), done, inplace=True)
    return done


def _attention(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * _FLOAT
    gate = None
    if block.fused:
        joint = graph.add((block.q + block.k + block.v) * unit, normed)
        query = graph.add(block.q * unit, joint)
        value = joint
        key = graph.add(block.k * unit, joint)
    else:
        query = graph.add(block.q * unit, normed)
        if block.query_gate:
            both = query
            query = graph.add(block.out * unit, both)
            gate = graph.add(block.out * unit, both)
        if batch.rotate_k:
            query = graph.add(block.out * unit if block.query_gate else block.q * unit, query)
        value = graph.add(block.v * unit, normed)
        if batch.rotate_v:
            value = graph.add(block.v * unit, value)
        key = graph.add(block.k * unit, normed)
    if batch.rotate_k:
        key = graph.add(block.k * unit, key)
    graph.add(0, key)
    graph.add(0, value)
    if batch.flash:
        result = graph.add(block.out * unit, query)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query)
        result = graph.add(block.out * unit, graph.add(block.out * unit, scores))
    if batch.rotate_v:
        result = graph.add(block.out * unit, result)
    if gate is not None:
        result = graph.add(block.out * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result)


def _latent_attention(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * _FLOAT
    source = graph.add(block.q_rank * unit, normed) if block.q_rank else normed
    query = graph.add(block.q * unit, source)
    turned = graph.add(block.heads * block.rope * unit, query)
    both = graph.add((block.latent + block.rope) * unit, normed)
    absorbed = graph.add(block.heads * block.latent * unit, query)
    query = graph.add(block.heads * (block.latent + block.rope) * unit, absorbed, turned)
    place = graph.add(block.rope * unit, both)
    value = graph.add(block.latent * unit, both)
    key = graph.add((block.latent + block.rope) * unit, value, place)
    graph.add(0, key)
    if batch.flash:
        result = graph.add(block.heads * block.latent * unit, query)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query)
        values = graph.add(block.latent * batch.cells * 2)
        result = graph.add(block.heads * block.latent * unit, scores, values)
    result = graph.add(block.out * unit, result)
    result = graph.add(block.out * unit, result)
    return graph.add(block.embd * unit, result)


def _mixer(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * _FLOAT
    if block.mixer == "conv":
        return _short_convolution(graph, block, batch, normed)
    if block.mixer.startswith("rwkv"):
        return _time_mix(graph, block, batch, normed)
    before = graph.add(block.conv_state * batch.sequences * _FLOAT)
    if block.mixer == "delta":
        return _delta(graph, block, batch, normed, before)
    joint = graph.add(block.projected * unit, normed)
    window = graph.add(
        (block.convolved * batch.tokens + block.conv_state * batch.sequences) * _FLOAT, before, joint
    )
    x = graph.add(block.convolved * unit, window)
    result_size = (block.inner * batch.tokens + block.mixer_state * batch.sequences) * _FLOAT
    if block.mixer == "mamba":
        small = graph.add((block.embd // 8) * unit, x)
        step = graph.add(block.inner * unit, small)
        scan = graph.add(result_size, x, step, small)
    else:
        step = graph.add(block.heads * unit, joint)
        scan = graph.add(result_size, x, step)
    skip = graph.add(block.inner * unit, x, inplace=block.mixer == "mamba")
    result = graph.add(result_size, scan, skip, inplace=True)
    gate = graph.add(block.inner * unit, joint)
    return graph.add(block.embd * unit, graph.add(block.inner * unit, gate, result))


def _delta(graph: Graph, block: Block, batch: Batch, normed: int, before: int) -> int:
    unit = batch.tokens * _FLOAT
    joint = graph.add(block.convolved * unit, normed)
    gate = graph.add(block.inner * unit, normed)
    window = graph.add(
        (block.convolved * batch.tokens + block.conv_state * batch.sequences) * _FLOAT, before, joint
    )
    state = graph.add(block.mixer_state * batch.sequences * _FLOAT)
    x = graph.add(block.convolved * unit, window)
    key = (block.convolved - block.inner) // 2
    query, keys = graph.add(key * unit, x), graph.add(key * unit, x)
    result_size = (block.inner * batch.tokens + block.mixer_state * batch.sequences) * _FLOAT
    result = graph.add(result_size, query, keys, x, state)
    result = graph.add(block.inner * unit, result)
    result = graph.add(block.inner * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result)


def _short_convolution(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * _FLOAT
    joint = graph.add(3 * block.embd * unit, normed)
    gated = graph.add(block.embd * unit, joint)
    before = graph.add(block.conv_state * batch.sequences * _FLOAT)
    window = graph.add(
        (block.embd * batch.tokens + block.conv_state * batch.sequences) * _FLOAT, before, gated
    )
    mixed = graph.add(block.embd * unit, window)
    gate = graph.add(block.embd * unit, mixed, joint, inplace=True)
    return graph.add(block.embd * unit, gate)


def _time_mix(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * _FLOAT
    hidden = block.embd * unit
    lerps = 5 if block.mixer == "rwkv6" else 6
    shifted = graph.add(hidden, normed)
    mixed = graph.add(lerps * hidden, shifted, normed)
    parts = [graph.add(hidden, mixed) for _ in range(lerps)]
    result = graph.add((block.embd * batch.tokens + block.mixer_state * batch.sequences) * _FLOAT, *parts)
    result = graph.add(hidden, result)
    return graph.add(hidden, result)


def _feed_forward(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    unit = tokens * _FLOAT
    if block.experts:
        return _experts(graph, block, tokens, normed)
    return _dense(graph, block.embd, block.ff, unit, normed, gated=block.gated, wide=block.wide)


def _dense(
    graph: Graph, embd: int, ff: int, unit: int, normed: int, *, gated: bool, wide: bool = False
) -> int:
    if wide:
        hidden = graph.add(ff * unit, graph.add(2 * ff * unit, normed))
    elif gated:
        gate = graph.add(ff * unit, normed)
        hidden = graph.add(ff * unit, gate, graph.add(ff * unit, normed))
    else:
        hidden = graph.add(ff * unit, normed)
    return graph.add(embd * unit, hidden)


def _experts(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    unit = tokens * _FLOAT
    width = block.latent_expert or block.embd
    common = None
    if block.ff:
        # Gemma 4: a dense layer beside the experts.
        common = _dense(graph, block.embd, block.ff, unit, normed, gated=block.gated)
    probabilities = graph.add(block.experts * unit, normed)
    choice = graph.add(block.experts * unit, probabilities) if block.choice else probabilities
    order = graph.add(block.experts * unit, choice)
    weights = graph.add(block.used * unit, probabilities, order)
    source = normed
    if block.latent_expert:
        source = graph.add(width * unit, normed)
    if block.expert_first:
        source = graph.add(block.used * width * unit, source, weights)
    many = block.used * block.ff_expert * unit
    up = graph.add(many, source, order)
    hidden = graph.add(many, up, graph.add(many, source, order)) if block.expert_gated else up
    results = graph.add(block.used * width * unit, hidden, order, weights)
    done = graph.add(width * unit, results)
    if block.latent_expert:
        done = graph.add(block.embd * unit, done)
    if block.ff_shared:
        common = _dense(graph, block.embd, block.ff_shared, unit, normed, gated=block.expert_gated)
    if common is not None:
        done = graph.add(block.embd * unit, done, common, inplace=True)
    return done


def _predictions(graph: Graph, block: Block, hidden: int, state: int) -> int:
    """AltUp's prediction for each of the streams (Gemma 3n)."""
    turned = graph.add(block.streams * hidden, state)
    mixed = graph.add(block.streams * hidden, turned)
    straight = graph.add(block.streams * hidden, mixed)
    return graph.add(block.streams * hidden, straight, state, inplace=True)


def _corrected(graph: Graph, block: Block, hidden: int, predictions: int, active: int) -> int:
    """AltUp's correction of the streams by what the block computed (Gemma 3n)."""
    change = graph.add(hidden, active, predictions, inplace=True)
    repeated = graph.add(block.streams * hidden, change)
    corrected = graph.add(block.streams * hidden, repeated, predictions, inplace=True)
    rest = graph.add((block.streams - 1) * hidden, corrected)
    return graph.add(block.streams * hidden, rest, corrected)
