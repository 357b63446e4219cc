"""Writes rerankers with random weights: an encoder with a classification head."""

from __future__ import annotations

from pathlib import Path

from tests.gguf.size import Size
from tests.gguf.writer import write


def write_reranker(path: Path, *, says_so: bool = True) -> Path:
    """Write a reranker. ``says_so``: its header has the pooling type for ranking; older files don't."""
    size = Size(layers=2)
    head = [
        ("cls.weight", (size.embd, size.embd)),
        ("cls.bias", (size.embd,)),
        ("cls.output.weight", (size.embd, 1)),
        ("cls.output.bias", (1,)),
    ]
    return write(
        path, "bert", size, kind="f32", more={"bert.pooling_type": 4 if says_so else 1}, tensors=head
    )
