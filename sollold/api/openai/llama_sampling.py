"""llama-server's own fields, typed here: it ignores most values of a wrong type, and fails on the others."""

from __future__ import annotations

from typing import Any

from sollold.api.engine.number_ranges import (
    Factor,
    Finite,
    LimitOrNone,
    Mirostat,
    RepeatPenalty,
    Share,
    Small,
    Whole,
)
from sollold.api.engine.placement import V1Fields

_OPTIONS = {"num_ctx": "num_ctx", "num_predict": "max_tokens"}
"""Options of Ollama's API that its provider in goose sends here → the field that means the same."""


class LlamaSampling(V1Fields, kw_only=True):
    """Parsed only to check their types, and passed on, except `V1Fields`.

    ``repetition_penalty``: vLLM's name for ``repeat_penalty``.
    """

    top_k: Small | None = None
    min_p: Share | None = None
    min_keep: Small | None = None
    top_n_sigma: Finite | None = None
    typical_p: Share | None = None
    typ_p: Share | None = None
    dynatemp_range: Factor | None = None
    dynatemp_exponent: Factor | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    repeat_last_n: Whole | None = None
    repeat_penalty: RepeatPenalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    dry_multiplier: Factor | None = None
    dry_base: Factor | None = None
    dry_allowed_length: Small | None = None
    dry_penalty_last_n: Whole | None = None
    mirostat: Mirostat | None = None
    mirostat_tau: Factor | None = None
    mirostat_eta: Factor | None = None
    n_predict: LimitOrNone | None = None
    n_keep: Small | None = None
    n_indent: Small | None = None
    n_probs: Small | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    adaptive_target: Finite | None = None
    adaptive_decay: Share | None = None
    samplers: list[str] | str | None = None
    dry_sequence_breakers: list[str] | None = None
    logit_bias: dict[str, float | bool] | list[Any] | None = None
    post_sampling_probs: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    response_fields: list[str] | None = None
    return_tokens: bool | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    t_max_predict_ms: Small | None = None
    sse_ping_interval: Small | None = None


def with_llamas_names(body: dict[str, Any], parsed: LlamaSampling) -> dict[str, Any]:
    """Return ``body``, decoded as ``parsed``, with other servers' field names replaced.

    llama-server's own name takes precedence.
    """
    if parsed.repetition_penalty is None:
        return body
    out = {key: value for key, value in body.items() if key != "repetition_penalty"}
    if parsed.repeat_penalty is None:
        out["repeat_penalty"] = parsed.repetition_penalty
    return out


def with_options(body: dict[str, Any]) -> dict[str, Any]:
    """Return a chat's body with the fields that its ``options`` stand for. Its own fields take precedence."""
    options = body.get("options")
    if not isinstance(options, dict):
        return body
    out = {key: value for key, value in body.items() if key != "options"}
    if others := {name: value for name, value in options.items() if name not in _OPTIONS}:
        out["options"] = others
    if body.get("max_completion_tokens") is not None:
        options = {**options, "num_predict": None}
    for name, field in _OPTIONS.items():
        if out.get(field) is None and options.get(name) is not None:
            out[field] = options[name]
    return out
