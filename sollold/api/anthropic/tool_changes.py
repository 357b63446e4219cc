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
    """The tools that the caller offers at the end of its conversation."""
    given: dict[str | None, Tool] = {}
    # By name, so that many changes of many tools don't hold the loop.
    tools: dict[str | None, list[Tool]] = {}
    for tool in ask.tools or ():
        given.setdefault(_name(tool), tool)
        tools.setdefault(_name(tool), []).append(tool)
    changed = False
    for change in _changes(ask):
        named = change.get("tool")
        if not isinstance(named, dict):
            continue
        adds = change["type"] == "tool_addition"
        defined = named.get("definition")
        added = defined if isinstance(defined, dict) else None
        name = _name(named if added is None else added)
        if adds and added is None:
            added = given.get(name)
            if added is None or (name in tools and added in tools[name]):
                continue
        changed = True
        tools.pop(name, None)
        if adds and added is not None:
            tools[name] = [added]
    return [tool for alike in tools.values() for tool in alike] if changed else list(ask.tools or ())


def _name(tool: Tool) -> str | None:
    name = tool.get("name")
    return name if isinstance(name, str) else None


def _changes(ask: Tokens) -> Iterator[dict[str, Any]]:
    for turn in ask.messages or ():
        for block in turn.content if isinstance(turn.content, list) else ():
            inner = block.get("tool_changes") if block.get("type") == "compaction" else [block]
            for change in inner if isinstance(inner, list) else ():
                if isinstance(change, dict) and change.get("type") in CHANGES:
                    yield change
