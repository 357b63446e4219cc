"""The operations of one block of a model, as far as they need memory.

In the order in which llama.cpp's graphs (src/llama-graph.cpp, src/models/*.cpp) compute them for one ubatch.
What is done in place (a rope, an activation, adding a bias) does not show; neither do weights and caches.
"""

from __future__ import annotations

from sollold.models.block import FLOAT, Batch, Block
from sollold.models.graph import Graph
from sollold.models.handover import ALIGNED, Handed, ordered, taken_over
from sollold.models.mixers import MIXERS, Early, Slots, channel_mix, fetched_early, mixer
from sollold.models.opening import Opening

Row = tuple[tuple[Block, Batch], ...]
"""Blocks that follow each other, and what each is to compute."""


def peaks(
    row: Row,
    following: Row,
    *,
    piped: bool,
    first: bool,
    last: bool,
    ends: bool = False,
    home: bool = False,
    outputs: bool = False,
    opening: Opening | None = None,
    handed: Handed | None = None,
) -> list[int]:
    """Bytes that each block of a row needs at most, besides what their device is given.

    ``row``: blocks that a device computes one after another; ``following``: what comes next, there or
    elsewhere. ``piped``: batches follow each other through the devices; then the inputs lie before everything
    and are never freed. ``first``: the row begins with the first block of its device; ``ends``: it ends with
    the last of it; ``last``: with the last of the model. ``home``: the device is the head's processor;
    ``outputs``: it is told which tokens are output. ``opening``: what it makes when it begins the model;
    ``handed``: how it comes to its hidden state when it does not, and that matters.
    """
    block, batch = row[0]
    graph = Graph()
    if opening is not None and opening.done:
        graph.add(opening.raw, kept=True)
    size = block.embd * block.streams * batch.tokens * FLOAT
    given = 0
    normed = -1
    slots = Slots()
    then = next((one for one in (*row, *following) if asks(one[0])), None)
    recurs = any(later.mixer in MIXERS for later, _ in row)
    if handed is not None:
        early = Early(fetched_early(*then) if then else 0, slots)
        attends = bool(block.q or block.latent)
        normed, state = taken_over(graph, handed, batch, early, attends=attends, recurs=recurs, ends=ends)
        slots = early.slots
        if normed >= 0 and attends:
            given = ALIGNED
        elif any(later.q or later.latent for later, _ in row):
            graph.add(ALIGNED, kept=True)
            given = ALIGNED
    else:
        if not piped and first and fetched_early(block, batch):
            slots = Slots.of(graph, ends)
        early = Early(fetched_early(block, batch), slots)
        if home:
            # There all other inputs lie before the hidden state.
            graph.add(ALIGNED, kept=True)
        state = graph.add(size, kept=piped and first and not block.after)
        if not piped:
            # Elsewhere the first hidden state lies before them and leaves a hole there.
            given = ALIGNED
            graph.add(0 if home else ALIGNED, kept=True)
        elif first and not block.after:
            given = size
    if opening is not None and not opening.done:
        state = opening.scale(graph, state, size, piped=piped, home=home)
    if outputs and not piped and first:
        graph.add(ALIGNED, kept=True)
    if not piped and first and slots.busy < 0 and recurs:
        slots = Slots.of(graph, ends)
        early = Early(early.size, slots)
    if block.mixer == "rwkv7":
        # Every block needs the first one's value.
        graph.add(block.embd * batch.tokens * FLOAT, kept=True)
    marks = []
    for index, (block, batch) in enumerate(row):
        before, after = -1, early
        if asks(block):
            before = early.fetch(graph)
            then = next((one for one in (*row[index + 1 :], *following) if asks(one[0])), None)
            if index == len(row) - 1 and ends:
                then = None
            after = Early(fetched_early(*then) if then else 0, slots)
        ending = last and index == len(row) - 1
        state = _block(graph, block, batch, state, before, after, last=ending, normed=normed, opening=opening)
        normed = -1
        early = after
        marks.append(len(graph))
    return [peak - given for peak in graph.peaks(marks)]


def asks(block: Block) -> bool:
    """Whether llama.cpp asks for operations of a block by name: then all that they need comes before."""
    return bool(block.q or block.latent or block.mixer or block.experts)


def _block(
    graph: Graph,
    block: Block,
    batch: Batch,
    state: int,
    before: int,
    following: Early,
    *,
    last: bool,
    normed: int = -1,
    opening: Opening | None = None,
) -> int:
    last = last and not block.late
    hidden = block.embd * batch.tokens * FLOAT
    if block.after:
        return _block_normed_after(graph, block, batch, state, last=last)
    x = predictions = state
    if block.streams > 1:
        x = predictions = _predictions(graph, block, hidden, state)
    if normed < 0:
        normed = x if block.bare else graph.add(hidden, x)
    laurel = graph.add(hidden, normed) if block.streams > 1 else None
    # Where something else is computed before it is needed, attention's output matrix waits.
    waits = bool(block.mixer) or block.parallel == "late"
    parts = []
    if block.latent:
        parts.append(_latent_attention(graph, block, batch, normed))
    elif block.q:
        parts.append(_attention(graph, block, batch, normed, following, project=not waits))
    if block.mixer:
        if before < 0 and not block.mixer.startswith("rwkv"):
            before = following.slots.fetch(graph, block.conv_state * batch.sequences * FLOAT)
        source = graph.add(hidden, x) if parts else normed
        mixed, parts = mixer(graph, block, batch, source, parts, before, following)
        parts.append(mixed)
    tokens = batch.tokens
    if last and (not block.mixer or len(parts) == 1):
        tokens = batch.outputs
        hidden = block.embd * tokens * FLOAT
        parts = [graph.add(hidden, part) for part in parts]
        x = graph.add(hidden, x)
        normed = graph.add(hidden, normed) if block.parallel else normed
    if block.parallel and parts:
        fed = _feed_forward(graph, block, tokens, normed, following)
        if block.parallel == "early":
            return graph.add(hidden, graph.add(hidden, *parts, fed, inplace=True), x, inplace=True)
        fed = graph.add(hidden, fed, x, inplace=True)
        return graph.add(hidden, fed, graph.add(hidden, *parts), inplace=True)
    done = x
    if len(parts) > 1:
        parts = [graph.add(hidden, *parts, inplace=True)]
    for part in parts:
        # The result of these is seen in another shape.
        viewed = part if tokens == batch.tokens and block.mixer in ("mamba", "conv", "delta") else -1
        done = graph.add(hidden, *ordered(block, part, done), inplace=True, viewed=viewed)
    if laurel is not None:
        done = graph.add(hidden, done, laurel, inplace=True)
    if block.ff and block.experts and block.followed:
        done = graph.add(hidden, _beside(graph, block, tokens, done), done, inplace=True)
    elif block.ff or block.experts:
        second = done if block.bare else graph.add(hidden, done) if parts else normed
        fed = _feed_forward(graph, block, tokens, second, following)
        done = graph.add(hidden, *ordered(block, fed, done), inplace=True)
    if block.mixer.startswith("rwkv"):
        # The next token's shift is stored last.
        graph.add(0, normed)
    if block.streams > 1:
        return _corrected(graph, block, hidden, predictions, done)
    if block.per_layer:
        gate = graph.add(block.per_layer * tokens * FLOAT, done)
        if opening is not None:
            opening.make(graph)
        own = graph.add(hidden, gate)
        done = graph.add(hidden, *((done, own) if block.followed else (own, done)), inplace=True)
    return done


def _block_normed_after(graph: Graph, block: Block, batch: Batch, state: int, *, last: bool) -> int:
    """As in BERT: no norm before attention, but one after each half. There is no cache."""
    tokens = batch.outputs if last else batch.tokens
    hidden = block.embd * tokens * FLOAT
    following = Early(0, Slots())
    done = _attention(graph, block, batch, state, following)
    if last:
        done, state = graph.add(hidden, done), graph.add(hidden, state)
    done = graph.add(hidden, graph.add(hidden, done, state, inplace=True))
    done = graph.add(hidden, _feed_forward(graph, block, tokens, done, following), done, inplace=True)
    return graph.add(hidden, done)


def _attention(
    graph: Graph, block: Block, batch: Batch, normed: int, following: Early, *, project: bool = True
) -> int:
    unit = batch.tokens * FLOAT
    gate = None
    if block.fused:
        joint = graph.add((block.q + block.k + block.v) * unit, normed)
        query = graph.add(block.q * unit, joint)
        value = joint
        key = graph.add(block.k * unit, joint)
    else:
        query = graph.add(block.q * unit, normed)
        if block.reshaped:
            query = graph.add(block.q * unit, query)
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
        if block.reshaped:
            key = graph.add(block.k * unit, key)
    if batch.rotate_k:
        key = graph.add(block.k * unit, key)
    if block.cached:
        # Into the cache.
        graph.add(0, key)
        graph.add(0, value)
        key = value = query
    if batch.flash:
        if not block.cached:
            key, value = graph.add(block.k * unit // 2, key), graph.add(block.v * unit // 2, value)
        result = graph.add(block.out * unit, query, key, value)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query, key)
        # They come of the cache.
        values = () if block.cached and block.followed else (value,)
        result = graph.add(block.out * unit, graph.add(block.out * unit, scores, *values))
    if not block.experts and not block.mixer:
        following.fetch(graph)
    if batch.rotate_v and not (block.mixer and not project):
        result = graph.add(block.out * unit, result)
    if gate is not None:
        result = graph.add(block.out * unit, result, gate, inplace=True)
    if block.out_gate:
        result = graph.add(block.out * unit, result, graph.add(block.out * unit, normed), inplace=True)
    return graph.add(block.embd * unit, result) if project else result


def _latent_attention(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * FLOAT
    source = graph.add(block.q_rank * unit, normed) if block.q_rank else normed
    chosen = _chosen(graph, block, batch, source) if block.indexer else None
    query = graph.add(block.q * unit, source)
    absorbed = graph.add(block.heads * block.latent * unit, query)
    turned = graph.add(block.heads * block.rope * unit, query)
    query = graph.add(block.heads * (block.latent + block.rope) * unit, absorbed, turned)
    both = graph.add((block.latent + block.rope) * unit, normed)
    value = graph.add(block.latent * unit, both)
    place = graph.add(block.rope * unit, both)
    key = graph.add((block.latent + block.rope) * unit, value, place)
    graph.add(0, key)
    if chosen is not None:
        # A mask that only those chosen pass. Not followed step by step: rather too much than too little.
        mask = batch.cells * batch.tokens * (2 if batch.flash else FLOAT)
        none = graph.add(mask)
        zeros = graph.add(3 * min(block.chosen, batch.cells) * unit)
        query = graph.add(0, query, graph.add(mask, none), graph.add(mask, none, zeros, chosen))
    if batch.flash:
        result = graph.add(block.heads * block.latent * unit, query)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query)
        values = graph.add(block.latent * batch.cells * 2)
        result = graph.add(block.heads * block.latent * unit, scores, values)
    result = graph.add(block.out * unit, result)
    result = graph.add(block.out * unit, result)
    return graph.add(block.embd * unit, result)


def _chosen(graph: Graph, block: Block, batch: Batch, source: int) -> int:
    """The tokens that attention looks at, by scores of their own (DeepSeek 3.2)."""
    unit = batch.tokens * FLOAT
    query = graph.add(block.indexer * unit, graph.add(block.indexer * unit, source))
    scores = graph.add(batch.cells * unit, query)
    return graph.add(min(block.chosen, batch.cells) * unit, scores)


def _feed_forward(graph: Graph, block: Block, tokens: int, normed: int, following: Early) -> int:
    unit = tokens * FLOAT
    if block.mixer.startswith("rwkv"):
        return channel_mix(graph, block, tokens, normed)
    if block.experts:
        return _experts(graph, block, tokens, normed, following)
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


def _beside(graph: Graph, block: Block, tokens: int, state: int) -> int:
    """Experts and a dense layer beside them, each with a norm of its own, and one to choose by (Gemma 4)."""
    unit = tokens * FLOAT
    probabilities = graph.add(block.experts * unit, graph.add(block.embd * unit, state))
    order = graph.add(block.experts * unit, probabilities)
    weights = graph.add(block.used * unit, probabilities, order)
    weights = graph.add(block.used * unit, weights, graph.add(unit, weights))
    many = block.used * block.ff_expert * unit
    hidden = graph.add(many, graph.add(2 * many, graph.add(block.embd * unit, state), order))
    chosen = graph.add(block.embd * unit, graph.add(block.used * block.embd * unit, hidden, order, weights))
    normed = graph.add(block.embd * unit, state)
    common = _dense(graph, block.embd, block.ff, unit, normed, gated=block.gated)
    return graph.add(block.embd * unit, common, chosen, inplace=True)


def _experts(graph: Graph, block: Block, tokens: int, normed: int, following: Early) -> int:
    unit = tokens * FLOAT
    width = block.latent_expert or block.embd
    common = None
    if block.ff:
        # Gemma 4: a dense layer beside the experts.
        common = _dense(graph, block.embd, block.ff, unit, normed, gated=block.gated)
        common = graph.add(block.embd * unit, common, graph.add(block.embd * unit, normed))
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
    following.fetch(graph)
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
