"""Which drafts go on where llama-server reads images: it feeds what a projector made of one to the draft.

Tried with build b11434 for every architecture that the footprint knows: a model with a projector, and a chat
with an image. N-grams need only the text, so they always do.
"""

from __future__ import annotations

FOURFOLD = frozenset({"qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next"})
"""Architectures whose tokens have four positions."""
_MAYBE_FOURFOLD = frozenset({"glm4", "glm4moe", "hunyuan_vl"})
"""Those of which some files have."""
_OWN_LAYER = frozenset({"qwen35", "qwen35moe"})


def own_layer_reads_images(architecture: str) -> bool:
    """Whether a model that sees images can draft by its own layer; the others answer images with an error."""
    return architecture in _OWN_LAYER


def draft_model_reads_images(architecture: str) -> bool:
    """Whether another model can draft for one of this architecture that sees images.

    A draft loses count at an image whose tokens have four positions: llama-server answers with an error.
    """
    return architecture not in FOURFOLD | _MAYBE_FOURFOLD
