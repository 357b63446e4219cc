"""Tools that are added and removed within a conversation of ``/v1/messages``. Pure.

A system message may contain ``tool_addition`` and ``tool_removal`` blocks, as may ``tool_changes`` of a
compaction. Agents then leave ``tools`` unchanged, so that the beginning of the prompt stays cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sollold.api.anthropic.messages_ask import Tokens

Tool = dict[str, Any]

CHANGES = ("tool_addition", "tool_removal")


def current_tools(ask: Tokens) -> list[Tool]:
    """Return the tools that the caller offers at the end of its conversation."""
    offered: dict[str | None, Tool] = {}
    # By name, so that many changes of many tools don't hold the loop.
    tools: dict[str | None, list[Tool]] = {}
    for tool in ask.tools or ():
        offered.setdefault(_name(tool), tool)
        tools.setdefault(_name(tool), []).append(tool)
    changed = False
    for change in _changes(ask):
        reference = change.get("tool")
        if not isinstance(reference, dict):
            continue
        is_addition = change["type"] == "tool_addition"
        definition = reference.get("definition")
        addition = definition if isinstance(definition, dict) else None
        name = _name(reference if addition is None else addition)
        if is_addition and addition is None:
            addition = offered.get(name)
            if addition is None or (name in tools and addition in tools[name]):
                continue
        changed = True
        tools.pop(name, None)
        if is_addition and addition is not None:
            tools[name] = [addition]
    return [tool for group in tools.values() for tool in group] if changed else list(ask.tools or ())


def _name(tool: Tool) -> str | None:
    name = tool.get("name")
    return name if isinstance(name, str) else None


def _changes(ask: Tokens) -> Iterator[dict[str, Any]]:
    for turn in ask.messages or ():
        for block in turn.content if isinstance(turn.content, list) else ():
            changes = block.get("tool_changes") if block.get("type") == "compaction" else [block]
            for change in changes if isinstance(changes, list) else ():
                if isinstance(change, dict) and change.get("type") in CHANGES:
                    yield change
