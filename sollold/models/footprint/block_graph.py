"""Builds the operations of a model's blocks, as far as they need memory.

In the order in which llama.cpp's graphs (src/llama-graph.cpp, src/models/*.cpp) compute them for one ubatch.
Operations done in place (a rope, an activation, adding a bias) are left out; so are weights and caches.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.attention import attention, latent_attention
from sollold.models.footprint.block import FLOAT, Batch, Block
from sollold.models.footprint.device_boundary import ALIGNED, Handed, Opening, ordered, receive_state
from sollold.models.footprint.feed_forward import experts_beside_dense, feed_forward
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.recurrent import MIXERS, Early, Slots, fetched_early, mixer

Row = tuple[tuple[Block, Batch], ...]
"""Consecutive blocks, each with its batch."""


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
    """Return the peak bytes of each block in a row, without the inputs of its device.

    ``row``: blocks that a device computes one after another; ``following``: the blocks after them, there or
    elsewhere. ``piped``: batches are pipelined through the devices; the inputs then lie before everything and
    are never freed. ``first``: the row begins with the first block of its device; ``ends``: it ends with the
    last block of the device; ``last``: with the last of the model. ``home``: the device is the head's CPU;
    ``outputs``: it receives the output token ids. ``opening``: what the device computes when it begins the
    model; ``handed``: how it receives the hidden state when it does not, where that matters.
    """
    graph = Graph()
    if opening is not None and opening.done:
        graph.add(opening.raw, kept=True)
    start = _begin(graph, row, following, piped=piped, first=first, ends=ends, home=home, handed=handed)
    block, batch = row[0]
    size = block.embd * block.streams * batch.tokens * FLOAT
    state, early, normed = start.state, start.early, start.normed
    if opening is not None and not opening.done:
        state = opening.scale(graph, state, size, piped=piped, home=home)
    if outputs and not piped and first:
        graph.add(ALIGNED, kept=True)
    if not piped and first and early.slots.busy < 0 and _recurs(row):
        early = Early(early.size, Slots.of(graph, ends))
    if block.mixer == "rwkv7":
        # Every block needs the first block's value.
        graph.add(block.embd * batch.tokens * FLOAT, kept=True)
    slots = early.slots
    marks = []
    for index, (block, batch) in enumerate(row):
        fetched, next_early = -1, early
        if added_explicitly(block):
            fetched = early.fetch(graph)
            nothing_after = index == len(row) - 1 and ends
            next_block = None if nothing_after else _next_added((*row[index + 1 :], *following))
            next_early = Early(fetched_early(*next_block) if next_block else 0, slots)
        is_last = last and index == len(row) - 1
        state = _block(
            graph, block, batch, state, fetched, next_early, last=is_last, normed=normed, opening=opening
        )
        normed = -1
        early = next_early
        marks.append(len(graph))
    return [peak - start.given for peak in graph.peaks(marks)]


@dataclass(frozen=True, slots=True)
class _Start:
    """The start of a row.

    ``state``: its hidden state; ``normed``: that after a norm, -1: not computed yet; ``given``: bytes of the
    device's inputs, which are not counted for the row.
    """

    state: int
    normed: int
    early: Early
    given: int


def _begin(
    graph: Graph,
    row: Row,
    following: Row,
    *,
    piped: bool,
    first: bool,
    ends: bool,
    home: bool,
    handed: Handed | None,
) -> _Start:
    """Add what a device holds before the first block of its row; arguments as for `peaks`."""
    block, batch = row[0]
    size = block.embd * block.streams * batch.tokens * FLOAT
    slots = Slots()
    given = 0
    if handed is not None:
        next_block = _next_added((*row, *following))
        early = Early(fetched_early(*next_block) if next_block else 0, slots)
        attends = bool(block.q or block.latent)
        normed, state = receive_state(
            graph, handed, batch, early, attends=attends, recurs=_recurs(row), ends=ends
        )
        if normed >= 0 and attends:
            given = ALIGNED
        elif any(later.q or later.latent for later, _ in row):
            graph.add(ALIGNED, kept=True)
            given = ALIGNED
        return _Start(state, normed, early, given)
    if not piped and first and fetched_early(block, batch):
        slots = Slots.of(graph, ends)
    early = Early(fetched_early(block, batch), slots)
    if home:
        # On the head's CPU all other inputs precede the hidden state.
        graph.add(ALIGNED, kept=True)
    state = graph.add(size, kept=piped and first and not block.after)
    if not piped:
        # Elsewhere the first hidden state precedes them and leaves a hole there.
        given = ALIGNED
        graph.add(0 if home else ALIGNED, kept=True)
    elif first and not block.after:
        given = size
    return _Start(state, -1, early, given)


def add_block(graph: Graph, block: Block, batch: Batch, state: int) -> int:
    """Add a single block after ``state``; return the hidden state that it yields."""
    return _block(graph, block, batch, state, -1, Early(0, Slots()), last=False)


def _recurs(row: Row) -> bool:
    return any(block.mixer in MIXERS for block, _ in row)


def _next_added(row: Row) -> tuple[Block, Batch] | None:
    """Return the next block with an operation that is added explicitly (`added_explicitly`)."""
    return next((pair for pair in row if added_explicitly(pair[0])), None)


def added_explicitly(block: Block) -> bool:
    """Return whether llama.cpp adds operations of a block explicitly (``ggml_build_forward_expand``).

    Everything that such an operation needs then precedes it.
    """
    return bool(block.q or block.latent or block.mixer or block.experts)


def _block(
    graph: Graph,
    block: Block,
    batch: Batch,
    state: int,
    fetched: int,
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
    parts = _mix_tokens(graph, block, batch, x, normed, fetched, following)
    tokens = batch.tokens
    if last and (not block.mixer or len(parts) == 1):
        tokens = batch.outputs
        hidden = block.embd * tokens * FLOAT
        parts = [graph.add(hidden, part) for part in parts]
        x = graph.add(hidden, x)
        normed = graph.add(hidden, normed) if block.parallel else normed
    if block.parallel and parts:
        return _parallel(graph, block, tokens, x, normed, parts, following)
    # These mixers' results are used through a view of another shape.
    viewed = tokens == batch.tokens and block.mixer in ("mamba", "conv", "delta")
    result = _add_parts(graph, block, hidden, x, parts, viewed=viewed)
    if laurel is not None:
        result = graph.add(hidden, result, laurel, inplace=True)
    result = _feed(graph, block, tokens, result, normed if not parts else -1, following)
    if block.mixer.startswith("rwkv"):
        # The shift for the next token is stored last.
        graph.add(0, normed)
    if block.streams > 1:
        return _corrected(graph, block, hidden, predictions, result)
    if block.per_layer:
        gate = graph.add(block.per_layer * tokens * FLOAT, result)
        if opening is not None:
            opening.make(graph)
        extra = graph.add(hidden, gate)
        result = graph.add(hidden, *((result, extra) if block.followed else (extra, result)), inplace=True)
    return result


def _mix_tokens(
    graph: Graph, block: Block, batch: Batch, x: int, normed: int, fetched: int, following: Early
) -> list[int]:
    """Add attention, its replacement or companion; return the results to be added to the hidden state."""
    # If something else is computed before its result is needed, attention's output matrix is delayed.
    waits = bool(block.mixer) or block.parallel == "late"
    parts = []
    if block.latent:
        parts.append(latent_attention(graph, block, batch, normed))
    elif block.q:
        parts.append(attention(graph, block, batch, normed, following, project=not waits))
    if block.mixer:
        if fetched < 0 and not block.mixer.startswith("rwkv"):
            fetched = following.slots.fetch(graph, block.conv_state * batch.sequences * FLOAT)
        source = graph.add(block.embd * batch.tokens * FLOAT, x) if parts else normed
        mixed, parts = mixer(graph, block, batch, source, parts, fetched, following)
        parts.append(mixed)
    return parts


def _parallel(
    graph: Graph, block: Block, tokens: int, x: int, normed: int, parts: list[int], following: Early
) -> int:
    """Add a feed-forward layer that starts from the same norm as attention; return the sum."""
    hidden = block.embd * tokens * FLOAT
    fed = feed_forward(graph, block, tokens, normed, following)
    if block.parallel == "early":
        return graph.add(hidden, graph.add(hidden, *parts, fed, inplace=True), x, inplace=True)
    fed = graph.add(hidden, fed, x, inplace=True)
    return graph.add(hidden, fed, graph.add(hidden, *parts), inplace=True)


def _add_parts(graph: Graph, block: Block, hidden: int, x: int, parts: list[int], *, viewed: bool) -> int:
    """Return the hidden state with attention's and the mixer's results added."""
    if len(parts) > 1:
        parts = [graph.add(hidden, *parts, inplace=True)]
    for part in parts:
        view = part if viewed else -1
        x = graph.add(hidden, *ordered(block, part, x), inplace=True, viewed=view)
    return x


def _feed(graph: Graph, block: Block, tokens: int, state: int, normed: int, following: Early) -> int:
    """Return the hidden state with the feed-forward layer's result added.

    ``normed``: its input; -1: still to be computed.
    """
    hidden = block.embd * tokens * FLOAT
    if block.ff and block.experts and block.followed:
        return graph.add(hidden, experts_beside_dense(graph, block, tokens, state), state, inplace=True)
    if not (block.ff or block.experts):
        return state
    source = state if block.bare else normed if normed >= 0 else graph.add(hidden, state)
    fed = feed_forward(graph, block, tokens, source, following)
    return graph.add(hidden, *ordered(block, fed, state), inplace=True)


def _block_normed_after(graph: Graph, block: Block, batch: Batch, state: int, *, last: bool) -> int:
    """Add a block as in BERT: no norm before attention, but one after each half; no cache."""
    tokens = batch.outputs if last else batch.tokens
    hidden = block.embd * tokens * FLOAT
    following = Early(0, Slots())
    result = attention(graph, block, batch, state, following)
    if last:
        result, state = graph.add(hidden, result), graph.add(hidden, state)
    result = graph.add(hidden, graph.add(hidden, result, state, inplace=True))
    result = graph.add(hidden, feed_forward(graph, block, tokens, result, following), result, inplace=True)
    return graph.add(hidden, result)


def _predictions(graph: Graph, block: Block, hidden: int, state: int) -> int:
    """Add AltUp's prediction of each stream (Gemma 3n)."""
    permuted = graph.add(block.streams * hidden, state)
    mixed = graph.add(block.streams * hidden, permuted)
    restored = graph.add(block.streams * hidden, mixed)
    return graph.add(block.streams * hidden, restored, state, inplace=True)


def _corrected(graph: Graph, block: Block, hidden: int, predictions: int, active: int) -> int:
    """Add AltUp's correction of the streams by the block's result (Gemma 3n)."""
    change = graph.add(hidden, active, predictions, inplace=True)
    repeated = graph.add(block.streams * hidden, change)
    corrected = graph.add(block.streams * hidden, repeated, predictions, inplace=True)
    rest = graph.add((block.streams - 1) * hidden, corrected)
    return graph.add(block.streams * hidden, rest, corrected)
