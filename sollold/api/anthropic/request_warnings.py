"""Warnings about parts of a request to ``/v1/messages`` that have no effect here. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.anthropic.blocks import block_kinds, is_hosted_result, is_known, wants_citations
from sollold.api.anthropic.messages_ask import Messages
from sollold.api.engine.ignored_fields import (
    OF_THE_CALLER,
    ignored_fields,
    ignored_parts,
    tool_notes,
    without_effect,
)

_FIELDS = frozenset({*Messages.__struct_fields__, *OF_THE_CALLER})
_PARTS = {
    "output_config": ("effort", "format"),
    "thinking": ("type", "budget_tokens", "display"),
    "tool_choice": ("type", "name", "disable_parallel_tool_use"),
}
_MAX_KINDS = 8
_MAX_LENGTH = 40


def message_warnings(body: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each part of the original request that has no effect here."""
    known = _FIELDS | {"context_management"} if _keeps_all(body.get("context_management")) else _FIELDS
    warnings = [*ignored_fields(body, known), *ignored_parts(body, _PARTS)]
    warnings += _thinking_warnings(body)
    if wants_citations(body.get("messages")):
        warnings.append("citations has no effect: answers cite nothing here")
    kinds = block_kinds(body.get("messages"))
    for reason, left_out in (
        ("are not known here", [kind for kind in kinds if not is_known(kind)]),
        ("come from tools that ran at Anthropic", [kind for kind in kinds if is_hosted_result(kind)]),
    ):
        if left_out:
            names = ", ".join(kind[:_MAX_LENGTH] for kind in left_out[:_MAX_KINDS])
            warnings.append(f"content blocks of type {names} {reason} and are left out")
    return tuple(warnings)


def _thinking_warnings(body: dict[str, Any]) -> list[str]:
    value, output = body.get("thinking"), body.get("output_config")
    thinking = value if isinstance(value, dict) else {}
    kind, display = thinking.get("type"), thinking.get("display")
    warnings = []
    if isinstance(display, str) and display not in ("summarized", "omitted"):
        warnings.append(f"thinking.display {display[:_MAX_LENGTH]} has no effect: thinking is shown as it is")
    if kind == "between_tools":
        warnings.append("thinking.type between_tools means disabled here: no text becomes thinking")
    if kind not in ("enabled", "adaptive") and isinstance(output, dict) and output.get("effort"):
        warnings.append("output_config.effort has no effect: thinking is not enabled")
    return warnings


_LLAMA_FIELDS = {"top_k": "top_k", "reasoning_budget_tokens": "thinking.budget_tokens"}
"""llama-server's name → the caller's."""


def native_message_notes(body: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each field that has no effect when an Ollama answers.

    ``body``: from ``messages_body``, without what the model's Modelfile adds.
    """
    ignored = [name for field, name in _LLAMA_FIELDS.items() if field in body]
    return (*without_effect(ignored), *tool_notes(body, "tool_choice.disable_parallel_tool_use"))


def _keeps_all(management: object) -> bool:
    """Whether the field requests only to keep all thinking, as Claude Code does in every request."""
    edits = management.get("edits") if isinstance(management, dict) else None
    return isinstance(edits, list) and all(
        isinstance(edit, dict)
        and str(edit.get("type")).startswith("clear_thinking_")
        and edit.get("keep") == "all"
        for edit in edits
    )
