"""How a model is to be run: what its footprint depends on besides the file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """llama-server's settings that decide memory.

    Attributes:
        context: tokens in all slots together (``-c``).
        slots: requests at a time (``-np``); each has ``context // slots`` tokens unless unified.
        unified: one KV pool for all slots (``-kvu``).
        type_k, type_v: KV types (``f16``, ``q8_0``, ``q4_0`` …).
        batch, ubatch: logical and physical batch (``-b``, ``-ub``), tokens.
        flash: flash attention: ``on``, ``off`` or ``auto`` (``-fa``).
        embedding: serve embeddings (``--embedding``).
        checkpoints: most copies of a slot's state that are kept to go back to (``--ctx-checkpoints``).
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
