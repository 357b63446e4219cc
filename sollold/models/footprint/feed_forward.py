"""The operations of feed-forward layers, dense or with experts, that need memory.

See `sollold.models.footprint.block_graph`.
"""

from __future__ import annotations

from sollold.models.footprint.block import FLOAT, Block
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.recurrent import Early, channel_mix


def feed_forward(graph: Graph, block: Block, tokens: int, normed: int, following: Early) -> int:
    """Add a block's feed-forward layer (RWKV's channel mix, experts or a dense one); return its result."""
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


def experts_beside_dense(graph: Graph, block: Block, tokens: int, state: int) -> int:
    """Add experts beside a dense layer, each with its own norm, and a norm for the router (Gemma 4)."""
    unit = tokens * FLOAT
    probabilities = graph.add(block.experts * unit, graph.add(block.embd * unit, state))
    order = graph.add(block.experts * unit, probabilities)
    weights = graph.add(block.used * unit, probabilities, order)
    weights = graph.add(block.used * unit, weights, graph.add(unit, weights))
    expert_bytes = block.used * block.ff_expert * unit
    hidden = graph.add(expert_bytes, graph.add(2 * expert_bytes, graph.add(block.embd * unit, state), order))
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
    expert_bytes = block.used * block.ff_expert * unit
    up = graph.add(expert_bytes, source, order)
    hidden = graph.add(expert_bytes, up, graph.add(expert_bytes, source, order)) if block.expert_gated else up
    results = graph.add(block.used * width * unit, hidden, order, weights)
    result = graph.add(width * unit, results)
    following.fetch(graph)
    if block.latent_expert:
        result = graph.add(block.embd * unit, result)
    if block.ff_shared:
        common = _dense(graph, block.embd, block.ff_shared, unit, normed, gated=block.expert_gated)
    if common is not None:
        result = graph.add(block.embd * unit, result, common, inplace=True)
    return result
