"""How a device that begins within a model comes to its hidden state, where batches are not pipelined.

The scheduler (ggml/src/ggml-backend.cpp) keeps what has weights with them; all else goes where its neighbours
in the graph are, to GPUs rather than to the processor.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.block import FLOAT, Batch, Block
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.recurrent import Early, Slots

ALIGNED = 128
"""Bytes of what stands for the other inputs; the graph rounds to that."""


@dataclass(frozen=True, slots=True)
class Handed:
    """How a device that begins within a model is handed the hidden state, without pipelining.

    Attributes:
        hosted: by the head's processor: then all of the block before that no weight holds there is computed
            here; by another device: then even the norm is computed there.
        before: the block before.
        interrupted: the block before whose end comes after what this device fetches early; None: none does.
        rotated: its attention's values are turned back.
    """

    hosted: bool
    before: Block
    interrupted: Block | None
    rotated: bool


def taken_over(
    graph: Graph, handed: Handed, batch: Batch, early: Early, *, attends: bool, recurs: bool, ends: bool
) -> tuple[int, int]:
    """The norm (-1: not yet computed) and the hidden state with which a device begins.

    ``early``: what it fetches early, and is told besides. ``attends``: so does its first block. ``recurs``:
    it has recurrent blocks. ``ends``: the last of them is known.
    """
    before, late = handed.before, handed.interrupted
    unit = batch.tokens * FLOAT
    hidden = before.embd * unit

    def tell() -> None:
        if recurs and early.slots.busy < 0:
            early.slots = Slots.of(graph, ends)

    if handed.hosted and before.experts and late is None and before.ff_shared:
        share = graph.add(unit)
        common, done, state = graph.add(hidden), graph.add(hidden), graph.add(hidden)
        tell()
        share = graph.add(unit, share, inplace=True)
        common = graph.add(hidden, common, share, inplace=True)
        done = graph.add(hidden, done, common, inplace=True)
        return -1, graph.add(hidden, *ordered(before, done, state), inplace=True)
    if handed.hosted and before.experts:
        results = graph.add(before.used * (before.latent_expert or before.embd) * unit)
        weights = graph.add(before.used * unit)
        tell()
        state = graph.add(hidden) if not before.ff_shared else -1
        results = graph.add(
            before.used * (before.latent_expert or before.embd) * unit, results, weights, inplace=True
        )
        done = graph.add(hidden, results)
        early.fetch(graph)
        if before.ff_shared:
            common, state = graph.add(hidden), graph.add(hidden)
            done = graph.add(hidden, done, common, inplace=True)
        return -1, graph.add(hidden, *ordered(before, done, state), inplace=True)
    if early.size:
        tell()
    if late is None or late.experts or late.mixer == "conv" or (late.q and not handed.rotated):
        early.fetch(graph)
    else:
        # What follows the state here, and is sent back.
        there, back = late.passed(batch.tokens)
        passed = graph.add(there)
        early.fetch(graph)
        graph.add(0, graph.add(back, passed))
    first = graph.add(hidden)
    if handed.hosted or (late is not None and late.experts and not late.ff_shared):
        second = graph.add(hidden)
        tell()
        return -1, graph.add(hidden, first, second, inplace=True)
    if attends:
        graph.add(ALIGNED, kept=True)
    tell()
    return first, graph.add(hidden)


def ordered(block: Block, part: int, state: int) -> tuple[int, int]:
    """A part and the hidden state in the order in which they are added."""
    return (state, part) if block.onto else (part, state)


@dataclass(slots=True)
class Opening:
    """The hidden state, scaled, and what layers have of their own: of that it holds all to the end.

    Attributes:
        raw: bytes of what layers have of their own, all together.
        done: it was made long before.
        selected, scaled: what it is made of.
    """

    raw: int
    done: bool
    selected: int = -1
    scaled: int = -1

    def scale(self, graph: Graph, state: int, size: int, *, piped: bool, home: bool) -> int:
        """The hidden state, scaled; ``home``: by the head's processor, in place."""
        # Pipelining keeps what it is made of, which is counted elsewhere.
        source = graph.add(0 if piped else self.raw)
        self.selected = graph.add(self.raw, source)
        self.scaled = graph.add(size, state, inplace=home)
        return self.scaled

    def make(self, graph: Graph) -> None:
        """What layers have of their own, once that is needed."""
        if not self.done:
            projected = graph.add(self.raw, graph.add(self.raw, self.scaled))
            graph.add(self.raw, graph.add(self.raw, projected, self.selected, inplace=True), kept=True)
            self.done = True
