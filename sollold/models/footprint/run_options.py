"""How a model is to be run: what its footprint depends on besides the file."""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.shape import Shape


@dataclass(frozen=True, slots=True)
class Run:
    """llama-server's settings that decide memory: as they are given, which may be less than was asked for.

    Attributes:
        context: tokens in all slots together (``-c``).
        slots: requests at a time (``-np``); each has ``context // slots`` tokens unless unified.
        unified: one KV pool for all slots (``-kvu``).
        type_k, type_v: KV types (``f16``, ``q8_0``, ``q4_0`` …).
        batch, ubatch: logical and physical batch (``-b``, ``-ub``), tokens.
        flash: flash attention: ``on``, ``off`` or ``auto`` (``-fa``).
        embedding: serve embeddings (``--embedding``).
        checkpoints: most copies of a slot's state that are kept to go back to (``--ctx-checkpoints``).
        drafts: most tokens that are drafted for a slot and then checked in one batch; 0: no speculation.
        predicts: the model's own layer for next-token prediction drafts them (``--spec-type draft-mtp``).
    """

    context: int
    slots: int = 1
    unified: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    flash: str = "auto"
    embedding: bool = False
    checkpoints: int = 0
    drafts: int = 0
    predicts: bool = False

    @property
    def results(self) -> int:
        """Tokens of a batch for which results are read off: the newest of each slot and its drafts."""
        return min(self.slots * (1 + self.drafts), self.batch)

    @property
    def states(self) -> int:
        """Recurrent states of a slot: one more for each token of a draft that may have to be taken back."""
        return 1 + self.drafts * self.predicts

    @property
    def request_context(self) -> int:
        """Tokens that one request may use."""
        return self.context if self.unified else self.context // self.slots


@dataclass(frozen=True, slots=True)
class Cells:
    """The sizes of a run: cells of the caches of one stream, streams, tokens and outputs of a ubatch."""

    full: int
    windowed: int
    streams: int
    tokens: int
    outputs: int
    sequences: int
    cached: bool

    def seen(self, window: bool) -> int:
        """Tokens that one token's attention looks at."""
        if not self.cached:
            return self.tokens
        return self.windowed if window else self.full

    @classmethod
    def of(cls, shape: Shape, run: Run) -> Cells:
        """Those of a model of this shape, run in this way."""
        context = padded(run.context or shape.context_train, 256)
        streams = 1 if run.unified else run.slots
        full = context if run.unified else padded(context // run.slots, 256)
        total = full * streams
        ubatch = min(run.ubatch, run.batch, total)
        windowed = min(full, padded(shape.window * (run.slots if run.unified else 1) + ubatch, 256))
        tokens = padded(ubatch, run.slots)
        outputs = tokens if run.embedding or not shape.cached else min(run.results, tokens)
        return cls(full, windowed, streams, tokens, outputs, run.slots, shape.cached)


def padded(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple
