"""What takes attention's place in a block, or stands beside it: scans, convolutions, RWKV's mixing.

In the order in which src/models/mamba-base.cpp, delta-net-base.cpp, lfm2.cpp and rwkv7-base.cpp compute them.
"""

from __future__ import annotations

from sollold.models.block import FLOAT, Batch, Block
from sollold.models.graph import Graph


def mixer(graph: Graph, block: Block, batch: Batch, normed: int, waiting: list[int]) -> tuple[int, list[int]]:
    """What takes attention's place or stands beside it; then ``waiting`` is attention's result."""
    unit = batch.tokens * FLOAT
    if block.mixer == "conv":
        return _short_convolution(graph, block, batch, normed), waiting
    if block.mixer.startswith("rwkv"):
        return _time_mix(graph, block, batch, normed), waiting
    before = graph.add(block.conv_state * batch.sequences * FLOAT)
    if block.mixer in ("delta", "kda", "lightning"):
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
    unit = batch.tokens * FLOAT
    joint = graph.add(block.convolved * unit, normed)
    window = graph.add(_convolved(block, batch), before, joint)
    state = graph.add(block.mixer_state * batch.sequences * FLOAT)
    x = graph.add(block.convolved * unit, window)
    key = (block.convolved - block.inner) // 2
    query, keys = graph.add(key * unit, x), graph.add(key * unit, x)
    if block.repeats and key < block.inner:
        query, keys = graph.add(block.inner * unit, query), graph.add(block.inner * unit, keys)
    result = graph.add(_scanned(block, batch), query, keys, x, state)
    result = graph.add(block.inner * unit, result)
    gate = graph.add(block.inner * unit, normed)
    if block.mixer != "delta":
        # Not followed step by step: its gates and decays are as wide as its keys, and wait until the end.
        graph.add(0, query, keys, x, *(graph.add(block.inner * unit, normed) for _ in range(4)))
    if block.mixer == "lightning":
        graph.add(0, *(graph.add(_decays(block, batch)) for _ in range(4)))
    result = graph.add(block.inner * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result)


def _decays(block: Block, batch: Batch) -> int:
    """Bytes of how much each token of a ubatch counts for each other, head by head (lightning attention)."""
    return block.heads * batch.tokens * batch.tokens * FLOAT


def _convolved(block: Block, batch: Batch) -> int:
    """Bytes of a convolution's input: the tokens', and what is kept of those before."""
    return (block.convolved * batch.tokens + block.conv_state * batch.sequences) * FLOAT


def _scanned(block: Block, batch: Batch, width: int = 0) -> int:
    """Bytes of a scan's result: the tokens' and the new state."""
    return ((width or block.inner) * batch.tokens + block.mixer_state * batch.sequences) * FLOAT


def _short_convolution(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    unit = batch.tokens * FLOAT
    joint = graph.add(3 * block.embd * unit, normed)
    gated = graph.add(block.embd * unit, joint)
    before = graph.add(block.conv_state * batch.sequences * FLOAT)
    window = graph.add(
        (block.embd * batch.tokens + block.conv_state * batch.sequences) * FLOAT, before, gated
    )
    mixed = graph.add(block.embd * unit, window)
    gate = graph.add(block.embd * unit, mixed, joint, inplace=True)
    return graph.add(block.embd * unit, gate)


def _time_mix(graph: Graph, block: Block, batch: Batch, normed: int) -> int:
    """RWKV 6 and 7: everything is mixed with the token before, in several ways at once."""
    hidden = block.embd * batch.tokens * FLOAT
    state = block.mixer_state * batch.sequences * FLOAT
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


def channel_mix(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    """RWKV's feed-forward layer, which sees the token before too."""
    hidden = block.embd * tokens * FLOAT
    shift = graph.add(hidden, normed)
    if block.mixer == "rwkv7":
        return graph.add(hidden, graph.add(block.ff * tokens * FLOAT, graph.add(hidden, shift, normed)))
    receptance = graph.add(hidden, graph.add(hidden, shift, normed))
    key = graph.add(block.ff * tokens * FLOAT, graph.add(hidden, shift, normed))
    return graph.add(hidden, receptance, graph.add(hidden, key), inplace=True)
