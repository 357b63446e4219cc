"""Writes LoRA adapters with random weights."""

from __future__ import annotations

import functools
from pathlib import Path

from sollold.models.gguf import writer
from sollold.models.gguf.writer import NewTensor
from tests.gguf import weights
from tests.gguf.architectures import WRITABLE
from tests.gguf.size import Size


def write(path: Path | str, architecture: str, size: Size, rank: int = 16) -> Path:
    """Write an adapter for all matrices in the layers of a test model of this architecture and size."""
    tensors = []
    for name, shape in WRITABLE[architecture].tensors(size):
        if len(shape) == 2 and name.startswith("blk."):
            for part, dims in (("lora_a", (shape[0], rank)), ("lora_b", (rank, shape[1]))):
                full = f"{name}.{part}"
                data = functools.partial(weights.data, full, dims, weights.F16, 1)
                tensors.append(NewTensor(full, dims, weights.F16, data))
    metadata: dict[str, writer.MetadataValue] = {
        "general.architecture": WRITABLE[architecture].name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    writer.write(path, metadata, tensors)
    return Path(path)
