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
    """Return the tools that are offered at the end of the conversation."""
    given = list(ask.tools or ())
    tools = given
    for change in _changes(ask):
        tool = change.get("tool")
        if not isinstance(tool, dict):
            continue
        defined = tool.get("definition")
        added = defined if isinstance(defined, dict) else None
        name = tool.get("name") if added is None else added.get("name")
        if change["type"] == "tool_addition" and added is None:
            added = next((one for one in given if one.get("name") == name), None)
            if added is None or added in tools:
                continue
        tools = [one for one in tools if one.get("name") != name]
        if change["type"] == "tool_addition" and added is not None:
            tools.append(added)
    return tools


def _changes(ask: Tokens) -> Iterator[dict[str, Any]]:
    for turn in ask.messages or ():
        for block in turn.content if isinstance(turn.content, list) else ():
            inner = block.get("tool_changes") if block.get("type") == "compaction" else [block]
            for change in inner if isinstance(inner, list) else ():
                if isinstance(change, dict) and change.get("type") in CHANGES:
                    yield change
