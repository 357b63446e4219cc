"""Time to read a GGUF header with a vocabulary of 128,256 tokens and 280,147 merges.

``python -m tests.bench.header``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from sollold.models.gguf import reader as gguf
from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue
from tests.gguf.size import Size
from tests.gguf.writer import tensors_of

_TOKENS, _MERGES, _TIMES = 128_256, 280_147, 15
_GOAL = 0.1


def _write(path: Path) -> None:
    size = Size(layers=80, embd=64, heads=2, ff=64, vocab=512)
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": size.layers,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token {number:06}" for number in range(_TOKENS)],
        "tokenizer.ggml.token_type": [1] * _TOKENS,
        "tokenizer.ggml.merges": [f"part{number} rest" for number in range(_MERGES)],
    }
    writer.write(path, metadata, tensors_of("llama", size))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.gguf"
        _write(path)
        seconds, processor = [], []
        for _ in range(_TIMES):
            start, used = time.perf_counter(), time.process_time()
            header = gguf.read(path)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
    print(
        f"{'vocabulary':>12} {'merges':>9} {'tensors':>8} {'median ms':>10}"
        f" {'best ms':>8} {'CPU ms':>8} {'goal ms':>8}"
    )
    print(
        f"{header.length('tokenizer.ggml.tokens'):12,} {header.length('tokenizer.ggml.merges'):9,}"
        f" {len(header.tensors):8,} {1000 * statistics.median(seconds):10.1f}"
        f" {1000 * min(seconds):8.1f} {1000 * statistics.median(processor):8.1f} {1000 * _GOAL:8.0f}"
    )


if __name__ == "__main__":
    main()
