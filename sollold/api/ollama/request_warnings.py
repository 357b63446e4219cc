"""Warnings about fields of Ollama's dialect that have no effect here. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.ignored_fields import OF_THE_CALLER, ignored_fields
from sollold.api.ollama.request import Options

_LOADING = (
    *("num_gpu", "main_gpu", "num_batch", "num_thread", "numa", "low_vram", "num_gqa"),
    *("use_mmap", "use_mlock", "f16_kv", "vocab_only", "logits_all"),
)
_OPTIONS = frozenset(Options.__struct_fields__)
_REASONS = {
    **{f"options.{name}": "the cluster itself decides how a model is loaded" for name in _LOADING},
    **{
        f"options.{name}": "Ollama no longer supports it either"
        for name in ("penalize_newline", "tfs_z", "rope_frequency_base", "rope_frequency_scale")
    },
    **{name: f"it belongs in options: options.{name}" for name in Options.__struct_fields__},
}


def request_warnings(body: dict[str, Any], parsed: msgspec.Struct) -> tuple[str, ...]:
    """Return warnings for ``body``, decoded as ``parsed``, that apply to both engines."""
    return ignored_fields(body, OF_THE_CALLER | {*parsed.__struct_fields__}, _REASONS)


def option_warnings(options: dict[str, Any] | None) -> tuple[str, ...]:
    """Return warnings for ``options`` if llama.cpp answers; an Ollama receives all of them."""
    return ignored_fields(options or {}, _OPTIONS, _REASONS, within="options")
