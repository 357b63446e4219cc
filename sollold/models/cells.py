"""The sizes of a run that caches, masks and batches are reckoned from."""

from __future__ import annotations

from dataclasses import dataclass

from sollold.models.run import Run
from sollold.models.shape import Shape


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
        outputs = tokens if run.embedding or not shape.cached else min(run.slots, tokens)
        return cls(full, windowed, streams, tokens, outputs, run.slots, shape.cached)


def padded(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple
