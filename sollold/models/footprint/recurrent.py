"""The operations of mixers, which replace or accompany attention in a block: scans, convolutions, RWKV.

In the order in which src/models/mamba-base.cpp, delta-net-base.cpp, lfm2.cpp and rwkv7-base.cpp compute them.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.block import FLOAT, Batch, Block
from sollold.models.footprint.graph_allocator import Graph

MIXERS = ("mamba", "mamba2", "conv", "delta", "kda", "lightning")
"""Mixers that may occur among other kinds of blocks."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Index inputs that assign recurrent states to slots.

    ``busy``: slots with tokens in the batch; ``idle``: the others (none, so it is empty). -1: the input lies
    before everything else and so has no effect.
    """

    busy: int = -1
    idle: int = -1

    @classmethod
    def of(cls, graph: Graph, ends: bool) -> Slots:
        """Add the inputs at this point of the graph.

        ``ends``: the row includes the device's last recurrent block, after which they are freed.
        """
        return cls(graph.add(1, kept=not ends), graph.empty(kept=not ends))

    def fetch(self, graph: Graph, size: int) -> int:
        """Add the fetching of a state, and the moving of the idle slots' states."""
        state = graph.add(size, *self._of(self.busy))
        self.move(graph)
        return state

    def scan(self, graph: Graph, size: int, *sources: int) -> int:
        """Like `fetch`, but by an operation that uses the state at once."""
        result = graph.add(size, *sources, *self._of(self.busy))
        self.move(graph)
        return result

    def move(self, graph: Graph) -> None:
        """Add the moving of the idle slots' states: it moves nothing, but takes a place."""
        graph.add(0, graph.empty(*self._of(self.idle)))

    @staticmethod
    def _of(operation: int) -> tuple[int, ...]:
        return () if operation < 0 else (operation,)


@dataclass(slots=True)
class Early:
    """A recurrent block's convolution state, which is fetched before the rest of the block.

    The fetch precedes even the end of the previous block: it follows the last operation that llama.cpp adds
    explicitly (``ggml_build_forward_expand`` adds what such an operation needs, and leaves the rest for
    later).

    Attributes:
        size: bytes of the state; 0: the next block fetches none early.
        slots: the index inputs for the states.
        fetched: the operation that fetches it; -1: not fetched yet.
    """

    size: int
    slots: Slots
    fetched: int = -1

    def fetch(self, graph: Graph) -> int:
        """Add the fetch unless that has been done; return its operation."""
        if self.size and self.fetched < 0:
            self.fetched = self.slots.fetch(graph, self.size)
        return self.fetched


def fetches_early(block: Block) -> bool:
    """Return whether a block begins by fetching a convolution state."""
    return block.mixer in ("mamba", "mamba2", "conv") and not block.q


def fetched_early(block: Block, batch: Batch) -> int:
    """Return the bytes of the state that a block fetches early; 0: none."""
    return block.conv_state * batch.sequences * FLOAT * fetches_early(block)


def mixer(
    graph: Graph, block: Block, batch: Batch, normed: int, waiting: list[int], fetched: int, following: Early
) -> tuple[int, list[int]]:
    """Add a block's mixer; return its result, and ``waiting`` (attention's result) after its output matrix.

    ``fetched``: the convolution state. ``following``: the state that the next block fetches early.
    """
    unit = batch.tokens * FLOAT
    if block.mixer == "conv":
        return _short_convolution(graph, block, batch, normed, fetched, following), waiting
    if block.mixer.startswith("rwkv"):
        return _time_mix(graph, block, batch, normed, following.slots), waiting
    if block.mixer in ("delta", "kda", "lightning"):
        return _delta(graph, block, batch, normed, fetched, following.slots), waiting
    joint = graph.add(block.projected * unit, normed)
    window = graph.add(_convolved(block, batch), fetched, joint)
    x = graph.add(block.convolved * unit, window)
    if block.mixer == "mamba":
        small = graph.add((block.steps + 2 * block.mixer_state // max(block.inner, 1)) * unit, x)
        step = graph.add(block.inner * unit, graph.add(block.steps * unit, small))
        scan = following.slots.scan(graph, _scanned(block, batch), x, step, small)
    else:
        step = graph.add(block.steps * unit, joint)
        scan = following.slots.scan(graph, _scanned(block, batch), x, step)
    if not block.experts:
        following.fetch(graph)
    if batch.rotate_v:
        waiting = [graph.add(block.out * unit, part) for part in waiting]
    waiting = [graph.add(block.embd * unit, part) for part in waiting]
    gate = graph.add(block.inner * unit, joint)
    skip = graph.add(block.inner * unit, x, inplace=block.mixer == "mamba")
    result = graph.add(block.inner * unit, scan, skip, inplace=True)
    result = graph.add(block.inner * unit, gate, result)
    if block.mixer == "mamba2":
        result = graph.add(block.inner * unit, result)
    return graph.add(block.embd * unit, result), waiting


def _delta(graph: Graph, block: Block, batch: Batch, normed: int, fetched: int, slots: Slots) -> int:
    unit = batch.tokens * FLOAT
    joint = graph.add(block.convolved * unit, normed)
    window = graph.add(_convolved(block, batch), fetched, joint)
    state = slots.fetch(graph, block.mixer_state * batch.sequences * FLOAT)
    x = graph.add(block.convolved * unit, window)
    key = (block.convolved - block.inner) // 2
    projections: list[int] = []
    for _ in range(2):
        projections.append(graph.add(key * unit, x))
        if block.repeats and key < block.inner:
            projections.append(graph.add(block.inner * unit, projections.pop()))
    query, keys = projections
    # The decay and the update rate.
    rates = [graph.add(block.steps * unit, graph.add(block.steps * unit, normed)) for _ in range(2)]
    result = graph.add(_scanned(block, batch), query, keys, x, state, *rates)
    result = graph.add(block.inner * unit, result)
    gate = graph.add(block.inner * unit, graph.add(block.inner * unit, normed))
    if block.mixer != "delta":
        # Not modelled step by step: its gates and decays are as wide as its keys, and are needed until the
        # end.
        graph.add(0, query, keys, x, *(graph.add(block.inner * unit, normed) for _ in range(4)))
    if block.mixer == "lightning":
        graph.add(0, *(graph.add(_decays(block, batch)) for _ in range(4)))
    result = graph.add(block.inner * unit, result, gate, inplace=True)
    return graph.add(block.embd * unit, result)


def _decays(block: Block, batch: Batch) -> int:
    """Return the bytes of lightning attention's decay matrix: one weight per head and pair of tokens."""
    return block.heads * batch.tokens * batch.tokens * FLOAT


def _convolved(block: Block, batch: Batch) -> int:
    """Return the bytes of a convolution's input: that of the tokens, and the state kept from earlier ones."""
    return (block.convolved * batch.tokens + block.conv_state * batch.sequences) * FLOAT


def _scanned(block: Block, batch: Batch) -> int:
    """Return the bytes of a scan's result: the tokens', the new state, and that after each recent token."""
    return (block.inner * batch.tokens + block.mixer_state * batch.sequences * (1 + batch.kept)) * FLOAT


def _short_convolution(
    graph: Graph, block: Block, batch: Batch, normed: int, fetched: int, following: Early
) -> int:
    unit = batch.tokens * FLOAT
    joint = graph.add(3 * block.embd * unit, normed)
    gated = graph.add(block.embd * unit, joint)
    window = graph.add(
        (block.embd * batch.tokens + block.conv_state * batch.sequences) * FLOAT, fetched, gated
    )
    if not block.experts:
        following.fetch(graph)
    mixed = graph.add(block.embd * unit, window)
    gate = graph.add(block.embd * unit, joint, mixed, inplace=True)
    return graph.add(block.embd * unit, gate)


def _time_mix(graph: Graph, block: Block, batch: Batch, normed: int, slots: Slots) -> int:
    """Add RWKV 6's or 7's time mix: everything is mixed with the previous token, in several ways at once."""
    hidden = block.embd * batch.tokens * FLOAT
    state = block.mixer_state * batch.sequences * FLOAT
    shift = graph.add(hidden, normed)
    if block.mixer == "rwkv6":
        mixed = graph.add(5 * hidden, graph.add(hidden, shift, normed), shift, normed)
        fetched = slots.fetch(graph, state)
        key, value, receptance, decay = (graph.add(hidden, mixed) for _ in range(4))
        scan = graph.add(hidden + state, key, value, receptance, decay, fetched)
    else:
        mixed = graph.add(6 * hidden, shift, normed)
        fetched = slots.fetch(graph, state)
        receptance, decay, key, rate = (graph.add(hidden, mixed) for _ in range(4))
        scaled = graph.add(hidden, key)
        change = graph.add(hidden, rate, scaled)
        value = graph.add(hidden, mixed)
        difference = graph.add(hidden, value)
        value = graph.add(hidden, value, graph.add(hidden, mixed), difference, inplace=True)
        new_key = graph.add(hidden, change, scaled, inplace=True)
        unit_key = graph.add(hidden, graph.add(hidden, key, inplace=True))
        negative = graph.add(hidden, unit_key)
        scaled_key = graph.add(hidden, unit_key, rate, inplace=True)
        scan = graph.add(hidden + state, receptance, decay, new_key, value, negative, scaled_key, fetched)
        graph.add(0, receptance, new_key, value)
    result = graph.add(hidden, scan)
    gate = graph.add(hidden, mixed)
    return graph.add(hidden, graph.add(hidden, result, gate, inplace=True))


def channel_mix(graph: Graph, block: Block, tokens: int, normed: int) -> int:
    """Add RWKV's feed-forward layer, which also sees the previous token."""
    hidden = block.embd * tokens * FLOAT
    shift = graph.add(hidden, normed)
    if block.mixer == "rwkv7":
        return graph.add(hidden, graph.add(block.ff * tokens * FLOAT, graph.add(hidden, shift, normed)))
    receptance = graph.add(hidden, graph.add(hidden, shift, normed))
    key = graph.add(block.ff * tokens * FLOAT, graph.add(hidden, shift, normed))
    return graph.add(hidden, receptance, graph.add(hidden, key), inplace=True)
