"""Warns of request fields that have no effect: none is dropped silently. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from sollold.did_you_mean import did_you_mean

_CALLER_FIELDS = """
    user metadata client_metadata safety_identifier prompt_cache_key prompt_cache_retention
    prompt_cache_options prediction service_tier speed cache_control inference_geo betas diagnostics
    user_profile_id workspace_id billing_policy fallback_credit_token access_programs
"""
OF_THE_CALLER = frozenset(_CALLER_FIELDS.split())
"""Fields about the caller, billing, storage or speed elsewhere: the answer is the same without them."""

CACHE_PARTS = {"prompt_cache_options": ("mode", "ttl", "comparison_response_id")}
"""For `ignored_parts`: the part that is missing, ``prewarm``, asks for no answer."""

_REASONS = {
    "container": "code runs only at Anthropic",
    "context_management": "shorten the conversation before you send it",
    "compaction": "shorten the conversation before you send it",
    "fallbacks": "send a separate request to the other model",
    "include": "only OpenAI produces what it names",
    "max_tool_calls": "the tools that it counts run only at OpenAI",
    "moderation": "nothing is moderated here",
    "reasoning.exclude": "leave out the answer's reasoning_content yourself",
    "reasoning.max_tokens": "send reasoning_budget_tokens",
    "prompt_cache_options.prewarm": "an answer is generated; load the model with /api/cluster/load",
    "store": "chats are not kept here; /v1/responses keeps its responses for a while",
    "text": "it belongs to /v1/responses; a chat has response_format",
    "verbosity": "say in the prompt how long the answer should be",
    "thinking.budget_tokens": "send reasoning_budget_tokens",
    "text.verbosity": "say in the prompt how long the answer should be",
    "truncation": "it belongs to /v1/responses",
}
_UNKNOWN = "it is not known here"
_ALWAYS_TRUE = frozenset(("skip_special_tokens", "add_special_tokens", "spaces_between_special_tokens"))
"""Flags that are always on; all others are always off."""
_MAX_NAMED = 8
_MAX_CHARACTERS = 40
_MAX_GUESSES = 2


def ignored_fields(
    body: Mapping[str, Any], known: Set[str], reasons: Mapping[str, str] = _REASONS, *, within: str = ""
) -> tuple[str, ...]:
    """Return a warning for each field of ``body`` that requests something and is not in ``known``.

    ``reasons``: for fields that other servers know; ``within``: the field whose value ``body`` is.
    """
    names = [name for name, value in body.items() if name not in known and _has_effect(name, value)]
    warnings: list[str] = []
    guesses = 0
    for name in names[:_MAX_NAMED]:
        path = f"{within}.{name[:_MAX_CHARACTERS]}" if within else name[:_MAX_CHARACTERS]
        reason = reasons.get(path)
        if reason is None:
            reason = _UNKNOWN
            if guesses < _MAX_GUESSES and len(name) <= _MAX_CHARACTERS:
                guesses += 1
                reason += did_you_mean(name, known, 0.75)
        warnings.append(f"{path} has no effect: {reason}")
    if len(names) > _MAX_NAMED:
        warnings.append(f"{len(names) - _MAX_NAMED} more fields have no effect")
    return tuple(warnings)


def ignored_parts(body: Mapping[str, Any], known: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Return warnings for the fields of nested objects; ``known``: name of an object → its known fields."""
    warnings: tuple[str, ...] = ()
    for name, fields in known.items():
        value = body.get(name)
        if isinstance(value, dict):
            warnings += ignored_fields(value, frozenset(fields), within=name)
    return warnings


def context_note(num_ctx: int | None) -> tuple[str, ...]:
    """Return a warning that an Ollama ignores ``num_ctx`` in its OpenAI API."""
    return ("num_ctx has no effect: an Ollama answers, which accepts it only at /api",) if num_ctx else ()


def without_effect(names: Iterable[str]) -> tuple[str, ...]:
    """Return a warning for each field of ``names``."""
    return tuple(f"{name} has no effect: an Ollama answers" for name in names)


def tool_notes(body: dict[str, Any], parallel: str = "parallel_tool_calls") -> tuple[str, ...]:
    """Return a warning for each field about tools that an Ollama ignores.

    ``body``: the chat as sent to it; ``parallel``: the caller's name for ``parallel_tool_calls``.
    """
    if not body.get("tools"):
        return ()
    ignored = ["tool_choice"] if body.get("tool_choice") == "required" else []
    ignored += [parallel] if body.get("parallel_tool_calls") is False else []
    return without_effect(ignored)


def _has_effect(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value is not (name in _ALWAYS_TRUE)
    return value is not None and value not in ("", [], {})
