"""The run options that a model's footprint depends on, besides its file."""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.footprint.shape import Shape


@dataclass(frozen=True, slots=True)
class Run:
    """llama-server's settings that decide memory: the effective ones, which may be lower than requested.

    Attributes:
        context: tokens of all slots together (``-c``).
        slots: maximum number of concurrent requests (``-np``); each has ``context // slots`` tokens unless
            unified.
        unified: one KV pool for all slots (``-kvu``).
        type_k, type_v: KV types (``f16``, ``q8_0``, ``q4_0`` …).
        batch, ubatch: logical and physical batch size (``-b``, ``-ub``), in tokens.
        flash: flash attention: ``on``, ``off`` or ``auto`` (``-fa``).
        embedding: serve embeddings (``--embedding``).
        checkpoints: maximum number of copies of a slot's state to return to (``--ctx-checkpoints``).
        drafts: maximum number of tokens drafted for a slot and then verified in one batch; 0: no speculation.
        predicts: the model's own MTP layer drafts them (``--spec-type draft-mtp``).
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
        """Number of tokens of a batch with results: the newest of each slot and its drafts."""
        return min(self.slots * (1 + self.drafts), self.batch)

    @property
    def states(self) -> int:
        """Recurrent states per slot: one more for each drafted token that may have to be rolled back."""
        return 1 + self.drafts * self.predicts

    @property
    def request_context(self) -> int:
        """Maximum number of tokens of one request."""
        return self.context if self.unified else self.context // self.slots


@dataclass(frozen=True, slots=True)
class Cells:
    """The sizes of a run.

    ``full``, ``windowed``: cells of the caches of one stream; ``streams``: number of streams; ``tokens``,
    ``outputs``: tokens and outputs of a ubatch; ``sequences``: number of slots; ``cached``: the model has a
    cache.
    """

    full: int
    windowed: int
    streams: int
    tokens: int
    outputs: int
    sequences: int
    cached: bool

    def seen(self, window: bool) -> int:
        """Return the number of tokens that one token attends to."""
        if not self.cached:
            return self.tokens
        return self.windowed if window else self.full

    @classmethod
    def of(cls, shape: Shape, run: Run) -> Cells:
        """Compute the sizes for a model of this shape with these run options."""
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
    """Return ``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple
