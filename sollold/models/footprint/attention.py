"""The operations of attention that need memory; see `sollold.models.footprint.block_graph`."""

from __future__ import annotations

from sollold.models.footprint.block import FLOAT, Batch, Block
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.recurrent import Early


def attention(
    graph: Graph, block: Block, batch: Batch, normed: int, following: Early, *, project: bool = True
) -> int:
    """Add attention over the cache; return its result, after the output matrix if ``project``.

    ``following``: the state that the next block fetches early.
    """
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
            projection = query
            query = graph.add(block.out * unit, projection)
            gate = graph.add(block.out * unit, projection)
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
        # Store both in the cache.
        graph.add(0, key)
        graph.add(0, value)
        key = value = query
    mask = (batch.mask,) if batch.mask >= 0 else ()
    if batch.flash:
        if not block.cached:
            key, value = graph.add(block.k * unit // 2, key), graph.add(block.v * unit // 2, value)
        result = graph.add(block.out * unit, query, key, value, *mask)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query, key, *mask)
        # They are read from the cache.
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


def latent_attention(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    """Add DeepSeek's multi-head latent attention with its output matrix; return its result."""
    unit = batch.tokens * FLOAT
    source = graph.add(block.q_rank * unit, normed) if block.q_rank else normed
    chosen = _select_tokens(graph, block, batch, source) if block.indexer else None
    query = graph.add(block.q * unit, source)
    absorbed = graph.add(block.heads * block.latent * unit, query)
    rotated = graph.add(block.heads * block.rope * unit, query)
    query = graph.add(block.heads * (block.latent + block.rope) * unit, absorbed, rotated)
    joint = graph.add((block.latent + block.rope) * unit, normed)
    value = graph.add(block.latent * unit, joint)
    place = graph.add(block.rope * unit, joint)
    key = graph.add((block.latent + block.rope) * unit, value, place)
    graph.add(0, key)
    if chosen is not None:
        # A mask that lets only the chosen tokens through. Not modelled step by step: rather an overestimate
        # than an underestimate.
        mask_size = batch.cells * batch.tokens * (2 if batch.flash else FLOAT)
        masked = graph.add(mask_size)
        zeros = graph.add(3 * min(block.chosen, batch.cells) * unit)
        query = graph.add(0, query, graph.add(mask_size, masked), graph.add(mask_size, masked, zeros, chosen))
    mask = (batch.mask,) if batch.mask >= 0 else ()
    if batch.flash:
        result = graph.add(block.heads * block.latent * unit, query, *mask)
    else:
        scores = graph.add(block.heads * batch.cells * unit, query, *mask)
        values = graph.add(block.latent * batch.cells * 2)
        result = graph.add(block.heads * block.latent * unit, scores, values)
    result = graph.add(block.out * unit, result)
    result = graph.add(block.out * unit, result)
    return graph.add(block.embd * unit, result)


def _select_tokens(graph: Graph, block: Block, batch: Batch, source: int) -> int:
    """Add the selection of the tokens to attend to, by scores of its own (DeepSeek 3.2)."""
    unit = batch.tokens * FLOAT
    query = graph.add(block.indexer * unit, graph.add(block.indexer * unit, source))
    scores = graph.add(batch.cells * unit, query)
    return graph.add(min(block.chosen, batch.cells) * unit, scores)
