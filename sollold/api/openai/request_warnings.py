"""Warnings about fields of a chat or completion that have no effect, here or at an Ollama. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.calls import OWN_FIELDS
from sollold.api.engine.ignored_fields import (
    CACHE_PARTS,
    OF_THE_CALLER,
    context_note,
    ignored_fields,
    ignored_parts,
    tool_notes,
    without_effect,
)
from sollold.api.engine.protect import CHAT, GENERATION, SAMPLING
from sollold.api.openai.llama_sampling import LlamaSampling
from sollold.api.openai.raw_completion import OPTIONS
from sollold.api.openai.request import UNSUPPORTED_FIELDS, ApplyTemplate, ChatCompletion, Completion

_CHAT_FIELDS = frozenset(
    {
        *(SAMPLING | GENERATION | CHAT | OWN_FIELDS | OF_THE_CALLER),
        *ChatCompletion.__struct_fields__,
        *UNSUPPORTED_FIELDS,
        *("reasoning", "thinking", "enable_thinking", "input", "instructions", "max_output_tokens"),
    }
)
_COMPLETION_FIELDS = frozenset(
    {*(SAMPLING | GENERATION | OWN_FIELDS | OF_THE_CALLER), *Completion.__struct_fields__}
)


def chat_warnings(body: dict[str, Any], ask: ChatCompletion) -> tuple[str, ...]:
    """Return a warning for each field of a chat that has no effect here; ``body``: the original one."""
    warnings = ignored_fields(body, _CHAT_FIELDS) + ignored_parts(body, _CHAT_PARTS)
    if ask.web_search_options is not None:
        warnings += ("web_search_options has no effect: there is no web search here",)
    return warnings


def completion_warnings(body: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each field of a completion that has no effect here."""
    return ignored_fields(body, _COMPLETION_FIELDS) + ignored_parts(body, _PARTS)


def llama_warnings(body: dict[str, Any], parsed: msgspec.Struct) -> tuple[str, ...]:
    """Return a warning for each field without effect on an endpoint that only llama-server has."""
    known: frozenset[str] = frozenset()
    if isinstance(parsed, LlamaSampling):
        known = SAMPLING | GENERATION
    elif isinstance(parsed, ApplyTemplate):
        known = CHAT
    return ignored_fields(body, known | OWN_FIELDS | OF_THE_CALLER | {*parsed.__struct_fields__})


_PARTS = {"stream_options": ("include_usage", "include_obfuscation"), **CACHE_PARTS}
_CHAT_PARTS = {**_PARTS, "reasoning": ("effort", "enabled", "summary"), "thinking": ("type",)}


_OLLAMA_FIELDS = frozenset(
    ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "logprobs", "top_logprobs")
)
_LLAMA_FIELDS = (SAMPLING - _OLLAMA_FIELDS) | {
    *("grammar", "json_schema", "n_predict", "repetition_penalty", "chat_template_kwargs"),
    *("reasoning_budget_tokens", "thinking_budget_tokens", "continue_final_message", "add_generation_prompt"),
}
_NEUTRAL = {"repeat_penalty": 1, "repetition_penalty": 1, "typical_p": 1, "add_generation_prompt": True}


def native_chat_notes(body: dict[str, Any], ask: ChatCompletion, native: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each field of a chat that has no effect when an Ollama answers.

    ``body``: the original one; ``native``: the one sent to the Ollama.
    """
    ignored = _requested(body, _LLAMA_FIELDS)
    ignored += ["n"] if (ask.n or 1) > 1 else []
    return (*without_effect(ignored), *tool_notes(native), *context_note(ask.num_ctx))


def native_completion_notes(body: dict[str, Any], ask: Completion) -> tuple[str, ...]:
    """Return a warning for each field of a completion that has no effect when an Ollama answers."""
    if ask.suffix:
        return (*without_effect(_requested(body, _LLAMA_FIELDS)), *context_note(ask.num_ctx))
    return without_effect(_requested(body, SAMPLING - OPTIONS.keys() - _OLLAMA_FIELDS))


def _requested(body: dict[str, Any], fields: frozenset[str]) -> list[str]:
    """Return those of ``fields`` that are in ``body`` with a value that changes the answer."""
    return [name for name, value in body.items() if name in fields and value and value != _NEUTRAL.get(name)]
