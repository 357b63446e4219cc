"""Warns of fields of a request that have no effect when an Ollama answers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
