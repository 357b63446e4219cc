"""The fields of llama-server's own that hold a number or a switch: it overlooks one of another type."""

from __future__ import annotations

import msgspec


class LlamaSampling(msgspec.Struct, kw_only=True):
    """Read for their types alone, and passed on."""

    top_k: int | None = None
    min_p: float | None = None
    min_keep: int | None = None
    top_n_sigma: float | None = None
    typical_p: float | None = None
    typ_p: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    n_predict: int | None = None
    n_keep: int | None = None
    n_indent: int | None = None
    n_probs: int | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
