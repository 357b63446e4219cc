"""Models how a device that begins within a model gets its hidden state, without pipelining.

The scheduler (ggml/src/ggml-backend.cpp) keeps operations with weights on the device of the weights; all
others go where their neighbours in the graph are, preferably to GPUs rather than the CPU.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.block import FLOAT, Batch, Block
from sollold.models.footprint.graph_allocator import Graph
from sollold.models.footprint.recurrent import Early, Slots

ALIGNED = 128
"""Placeholder size of the other inputs, in bytes; the graph rounds up to this."""


@dataclass(frozen=True, slots=True)
class Handed:
    """How a device that begins within a model receives the hidden state, without pipelining.

    Attributes:
        hosted: the head's CPU sends it: the operations of the previous block that have no weights there
            are then computed on this device. Otherwise another device does, and even the norm is computed
            there.
        before: the previous block.
        interrupted: the earlier block whose end comes after this device's early fetch; None: there is none.
        rotated: the values of that block's attention are rotated back.
    """

    hosted: bool
    before: Block
    interrupted: Block | None
    rotated: bool


def receive_state(
    graph: Graph, handed: Handed, batch: Batch, early: Early, *, attends: bool, recurs: bool, ends: bool
) -> tuple[int, int]:
    """Add what a device begins with; return the norm (-1: not computed yet) and the hidden state.

    ``early``: the state it fetches early, with the index inputs for it. ``attends``: its first block has
    attention. ``recurs``: it has recurrent blocks. ``ends``: the row includes the last of them.
    """
    previous, halted = handed.before, handed.interrupted
    unit = batch.tokens * FLOAT
    hidden = previous.embd * unit

    def add_slots() -> None:
        if recurs and early.slots.busy < 0:
            early.slots = Slots.of(graph, ends)

    if handed.hosted and previous.experts and halted is None and previous.ff_shared:
        share = graph.add(unit)
        common, result, state = graph.add(hidden), graph.add(hidden), graph.add(hidden)
        add_slots()
        share = graph.add(unit, share, inplace=True)
        common = graph.add(hidden, common, share, inplace=True)
        result = graph.add(hidden, result, common, inplace=True)
        return -1, graph.add(hidden, *ordered(previous, result, state), inplace=True)
    if handed.hosted and previous.experts:
        results = graph.add(previous.used * (previous.latent_expert or previous.embd) * unit)
        weights = graph.add(previous.used * unit)
        add_slots()
        state = graph.add(hidden) if not previous.ff_shared else -1
        results = graph.add(
            previous.used * (previous.latent_expert or previous.embd) * unit, results, weights, inplace=True
        )
        result = graph.add(hidden, results)
        early.fetch(graph)
        if previous.ff_shared:
            common, state = graph.add(hidden), graph.add(hidden)
            result = graph.add(hidden, result, common, inplace=True)
        return -1, graph.add(hidden, *ordered(previous, result, state), inplace=True)
    if early.size:
        add_slots()
    if halted is None or halted.experts or halted.mixer == "conv" or (halted.q and not handed.rotated):
        early.fetch(graph)
    else:
        # The operations that move here with the state; their result is sent back.
        sent, returned = halted.passed(batch.tokens)
        passed = graph.add(sent)
        early.fetch(graph)
        graph.add(0, graph.add(returned, passed))
    first = graph.add(hidden)
    if handed.hosted or (halted is not None and halted.experts and not halted.ff_shared):
        second = graph.add(hidden)
        add_slots()
        return -1, graph.add(hidden, first, second, inplace=True)
    if attends:
        graph.add(ALIGNED, kept=True)
    add_slots()
    return first, graph.add(hidden)


def ordered(block: Block, part: int, state: int) -> tuple[int, int]:
    """Return a part and the hidden state in the order in which they are added."""
    return (state, part) if block.onto else (part, state)


@dataclass(slots=True)
class Opening:
    """The scaled hidden state and the per-layer embeddings, which are kept to the end (Gemma).

    Attributes:
        raw: bytes of the per-layer embeddings of all layers together.
        done: they were computed long before.
        selected, scaled: the operations they are computed from.
    """

    raw: int
    done: bool
    selected: int = -1
    scaled: int = -1

    def scale(self, graph: Graph, state: int, size: int, *, piped: bool, home: bool) -> int:
        """Add the scaled hidden state; ``home``: on the head's CPU, in place."""
        # With pipelining its source is an input, which is counted elsewhere.
        source = graph.add(0 if piped else self.raw)
        self.selected = graph.add(self.raw, source)
        self.scaled = graph.add(size, state, inplace=home)
        return self.scaled

    def make(self, graph: Graph) -> None:
        """Add the per-layer embeddings, when they are first needed."""
        if not self.done:
            projected = graph.add(self.raw, graph.add(self.raw, self.scaled))
            graph.add(self.raw, graph.add(self.raw, projected, self.selected, inplace=True), kept=True)
            self.done = True
