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
        inner, steps, projected, convolved: of the mixer: its width, that of its time steps, what it projects
            to, what it convolves; ``repeats``: keys are repeated to the width of values.
        mixer_state, conv_state: elements a sequence.
        ff, gated, wide: feed-forward layer; with a gate; the gate in the same matrix.
        experts, used, ff_expert, ff_shared: of a mixture of experts; ``latent_expert``: width they work at.
        parallel: attention and feed-forward start from the same norm: ``early`` or ``late``, by which is
            added first, attention or the hidden state.
        late: outputs are chosen only after the last block.
        after: norms follow attention and feed-forward; attention has no cache.
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
    latent: int = 0
    rope: int = 0
    q_rank: int = 0
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
    state = graph.add(size, kept=piped and first and not block.after)
    given = 0
    if not piped:
        # The first hidden state lies before the other inputs and leaves a hole there.
        given = graph.add(_FLOAT, kept=True) and _ALIGNED
    elif first and not block.after:
        given = size
    if block.mixer == "rwkv7":
        # Every block needs the first one's value.
        graph.add(block.embd * batch.tokens * _FLOAT, kept=True)
    rounds = 1 if last else _ROUNDS
    for _ in range(rounds):
        state = _block(graph, block, batch, state, last=last and not block.late)
    return graph.peak() - given


def _block(graph: Graph, block: Block, batch: Batch, state: int, *, last: bool) -> int:
    hidden = block.embd * batch.tokens * _FLOAT
    if block.after:
        return _block_normed_after(graph, block, batch, state, last=last)
    x = predictions = state
    if block.streams > 1:
        x = predictions = _predictions(graph, block, hidden, state)
    normed = graph.add(hidden, x)
    laurel = graph.add(hidden, normed) if block.streams > 1 else None
    # Where something else is computed before it is needed, attention's output matrix waits.
    waits = bool(block.mixer) or block.parallel == "late"
    parts = []
    if block.latent:
        parts.append(_latent_attention(graph, block, batch, normed))
    elif block.q:
        parts.append(_attention(graph, block, batch, normed, project=not waits))
    if block.mixer:
        source = graph.add(hidden, x) if parts else normed
        mixed, parts = _mixer(graph, block, batch, source, parts)
        parts.append(mixed)
    tokens = batch.tokens
    if last and (not block.mixer or len(parts) == 1):
        tokens = batch.outputs
        hidden = block.embd * tokens * _FLOAT
        parts = [graph.add(hidden, part) for part in parts]
        x = graph.add(hidden, x)
        normed = graph.add(hidden, normed) if block.parallel else normed
    if block.parallel and parts:
        fed = _feed_forward(graph, block, tokens, normed)
        if block.parallel == "early":
            return graph.add(hidden, graph.add(hidden, *parts, fed, inplace=True), x, inplace=True)
        fed = graph.add(hidden, fed, x, inplace=True)
        return graph.add(hidden, fed, graph.add(hidden, *parts), inplace=True)
    done = x
    for part in parts:
        done = graph.add(hidden, part, done, inplace=True)
    if laurel is not None:
        done = graph.add(hidden, done, laurel, inplace=True)
    if block.ff or block.experts:
        second = graph.add(hidden, done) if parts else normed
        done = graph.add(hidden, _feed_forward(graph, block, tokens, second), done, inplace=True)
    if block.mixer.startswith("rwkv"):
        # The next token's shift is stored last.
        graph.add(0, normed)
    if block.streams > 1:
        return _corrected(graph, block, hidden, predictions, done)
    if block.per_layer:
        gate = graph.add(block.per_layer * tokens * _FLOAT, done)
        done = graph.add(hidden, graph.add(hidden, gate), done, inplace=True)
    return done


def _block_normed_after(graph: Graph, block: Block, batch: Batch, state: int, *, last: bool) -> int:
    """As in BERT: no norm before attention, but one after each half. There is no cache."""
    tokens = batch.outputs if last else batch.tokens
    hidden = block.embd * tokens * _FLOAT
    done = _attention(graph, block, batch, state)
    if last:
        done, state = graph.add(hidden, done), graph.add(hidden, state)
    done = graph.add(hidden, graph.add(hidden, done, state, inplace=True))
    done = graph.add(hidden, _feed_forward(graph, block, tokens, done), done, inplace=True)
    return graph.add(hidden, done)


def _attention(graph: Graph, block: Block, batch: Batch, normed: int, *, project: bool = True) -> int:
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
    if not block.after:
        # Into the cache.
        graph.add(0, key)
        graph.add(0, value)
        key = value = query
    if batch.flash:
        if block.after:
            key, value = graph.add(block.k * unit // 2, key), graph.add(block.v * unit // 2, value)
        result = graph.add(block.out * unit, query, key, value)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query, key)
        result = graph.add(block.out * unit, graph.add(block.out * unit, scores, value))
    if batch.rotate_v:
        result = graph.add(block.out * unit, result)
    if gate is not None:
        result = graph.add(block.out * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result) if project else result


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


def _mixer(
    graph: Graph, block: Block, batch: Batch, normed: int, waiting: list[int]
) -> tuple[int, list[int]]:
    """What takes attention's place or stands beside it; then ``waiting`` is attention's result."""
    unit = batch.tokens * _FLOAT
    if block.mixer == "conv":
        return _short_convolution(graph, block, batch, normed), waiting
    if block.mixer.startswith("rwkv"):
        return _time_mix(graph, block, batch, normed), waiting
    before = graph.add(block.conv_state * batch.sequences * _FLOAT)
    if block.mixer == "delta":
        return _delta(graph, block, batch, normed, before), waiting
    joint = graph.add(block.projected * unit, normed)
    window = graph.add(_convolved(block, batch), before, joint)
    x = graph.add(block.convolved * unit, window)
    if block.mixer == "mamba":
        small = graph.add((block.steps + 2 * block.mixer_state // max(block.inner, 1)) * unit, x)
        step = graph.add(block.inner * unit, graph.add(block.steps * unit, small))
        scan = graph.add(_scanned(block, batch), x, step, small)
    else:
        step = graph.add(block.steps * unit, joint)
        scan = graph.add(_scanned(block, batch), x, step)
    waiting = [graph.add(block.embd * unit, part) for part in waiting]
    skip = graph.add(block.inner * unit, x, inplace=block.mixer == "mamba")
    result = graph.add(_scanned(block, batch), scan, skip, inplace=True)
    gate = graph.add(block.inner * unit, joint)
    return graph.add(block.embd * unit, graph.add(block.inner * unit, gate, result)), waiting


def _delta(graph: Graph, block: Block, batch: Batch, normed: int, before: int) -> int:
    unit = batch.tokens * _FLOAT
    joint = graph.add(block.convolved * unit, normed)
    window = graph.add(_convolved(block, batch), before, joint)
    state = graph.add(block.mixer_state * batch.sequences * _FLOAT)
    x = graph.add(block.convolved * unit, window)
    key = (block.convolved - block.inner) // 2
    query, keys = graph.add(key * unit, x), graph.add(key * unit, x)
    if block.repeats and key < block.inner:
        query, keys = graph.add(block.inner * unit, query), graph.add(block.inner * unit, keys)
    result = graph.add(_scanned(block, batch), query, keys, x, state)
    result = graph.add(block.inner * unit, result)
    gate = graph.add(block.inner * unit, normed)
    result = graph.add(block.inner * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result)


def _convolved(block: Block, batch: Batch) -> int:
    """Bytes of a convolution's input: the tokens', and what is kept of those before."""
    return (block.convolved * batch.tokens + block.conv_state * batch.sequences) * _FLOAT


def _scanned(block: Block, batch: Batch, width: int = 0) -> int:
    """Bytes of a scan's result: the tokens' and the new state."""
    return ((width or block.inner) * batch.tokens + block.mixer_state * batch.sequences) * _FLOAT


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
    """RWKV 6 and 7: everything is mixed with the token before, in several ways at once."""
    hidden = block.embd * batch.tokens * _FLOAT
    state = block.mixer_state * batch.sequences * _FLOAT
    shift = graph.add(hidden, normed)
    if block.mixer == "rwkv6":
        mixed = graph.add(5 * hidden, graph.add(hidden, shift, normed), shift, normed)
        before = graph.add(state)
        key, value, receptance, decay = (graph.add(hidden, mixed) for _ in range(4))
        scan = graph.add(hidden + state, key, value, receptance, decay, before)
    else:
        mixed = graph.add(6 * hidden, shift, normed)
        before = graph.add(state)
        receptance, decay, key, rate = (graph.add(hidden, mixed) for _ in range(4))
        scaled = graph.add(hidden, key)
        change = graph.add(hidden, rate, scaled)
        value = graph.add(hidden, mixed)
        other = graph.add(hidden, value)
        value = graph.add(hidden, value, graph.add(hidden, mixed), other, inplace=True)
        new_key = graph.add(hidden, change, scaled, inplace=True)
        unit_key = graph.add(hidden, graph.add(hidden, key, inplace=True))
        negative = graph.add(hidden, unit_key)
        turned = graph.add(hidden, unit_key, rate, inplace=True)
        scan = graph.add(hidden + state, receptance, decay, new_key, value, negative, turned, before)
        graph.add(0, receptance, new_key, value)
    result = graph.add(hidden, scan)
    gate = graph.add(hidden, mixed)
    return graph.add(hidden, graph.add(hidden, result, gate, inplace=True))


def _channel_mix(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    hidden = block.embd * tokens * _FLOAT
    shift = graph.add(hidden, normed)
    if block.mixer == "rwkv7":
        return graph.add(hidden, graph.add(block.ff * tokens * _FLOAT, graph.add(hidden, shift, normed)))
    receptance = graph.add(hidden, graph.add(hidden, shift, normed))
    key = graph.add(block.ff * tokens * _FLOAT, graph.add(hidden, shift, normed))
    return graph.add(hidden, receptance, graph.add(hidden, key), inplace=True)


def _feed_forward(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    unit = tokens * _FLOAT
    if block.mixer.startswith("rwkv"):
        return _channel_mix(graph, block, tokens, normed)
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
