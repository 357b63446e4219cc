"""Which kinds of draft work with images: llama-server feeds the projector's output to the draft too.

Tested with build b11434 for every architecture that the footprint knows: a model with a projector, and a chat
with an image. N-gram drafts need only the text, so they always work.
"""

from __future__ import annotations

FOURFOLD = frozenset({"qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next"})
"""Architectures with four positions per token (M-RoPE)."""
_MAYBE_FOURFOLD = frozenset({"glm4", "glm4moe", "hunyuan_vl"})
"""Architectures with four positions per token in some files only."""
_OWN_LAYER = frozenset({"qwen35", "qwen35moe"})


def own_layer_reads_images(architecture: str) -> bool:
    """Return whether a model with vision can draft by its own MTP layer; others fail on images."""
    return architecture in _OWN_LAYER


def draft_model_reads_images(architecture: str) -> bool:
    """Return whether another model can draft for one of this architecture that has vision.

    A draft miscounts the positions of an image's tokens if they have four: llama-server returns an error.
    """
    return architecture not in FOURFOLD | _MAYBE_FOURFOLD
