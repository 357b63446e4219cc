"""All architectures of test models, by the name that tests use."""

from __future__ import annotations

from tests.gguf import attention_models, further_models, recurrent_models, unknown_models
from tests.gguf.size import Architecture

ARCHITECTURES: dict[str, Architecture] = (
    attention_models.MODELS | further_models.MODELS | recurrent_models.MODELS
)

UNKNOWN = unknown_models.MODELS
"""Architectures without an exact footprint in sollold."""
WRITABLE = ARCHITECTURES | UNKNOWN

EMBEDDERS = frozenset(
    {
        *("bert", "nomic-bert", "nomic-bert-moe", "modern-bert", "jina-bert-v2", "jina-bert-v3"),
        *("gemma-embedding", "llama-embed"),
    }
)
"""Architectures of embedding models."""
