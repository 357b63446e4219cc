"""Converts the tools of ``/v1/messages`` to functions that a model can call. Pure.

A caller's own tools have a schema. Some kinds that Anthropic defines (``bash`` …) also run at the caller, but
have no schema, since Anthropic's models know it; it is defined here. All others (``web_search`` …) run at
Anthropic.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.anthropic.messages_ask import Tokens, ToolChoice
from sollold.api.anthropic.tool_changes import current_tools
from sollold.api.engine.fields import require_capability
from sollold.api.engine.tools import NO_ARGUMENTS, called_directly, require_tools, unknown_tools_message
from sollold.errors import bad_request
from sollold.models.model import Model

Tool = dict[str, Any]

_TEXT = {"type": "string"}
_INTEGER = {"type": "integer"}
_POINT = {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}


def _schema(required: str, **properties: Tool) -> Tool:
    return {"type": "object", "properties": properties, "required": [required]}


_EDITS: dict[str, Tool] = {
    "path": _TEXT,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _INTEGER,
    "insert_text": _TEXT,
}
_DEFINED: dict[str, tuple[str, Tool]] = {
    "bash": (
        "Run a command in a shell that stays open between calls.",
        _schema("command", command=_TEXT, restart={"type": "boolean"}),
    ),
    "text_editor": (
        "View and edit files: view (view_range: first and last line), create (file_text), str_replace "
        "(old_str must occur once; new_str), insert (insert_text after line insert_line).",
        _schema(
            "command",
            command={"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
            view_range=_POINT,
            **_EDITS,
        ),
    ),
    "memory": (
        "Keep notes in files below /memories: view, create (file_text), str_replace (old_str, new_str), "
        "insert (insert_text after line insert_line), delete, rename (old_path, new_path).",
        _schema(
            "command",
            command={
                "type": "string",
                "enum": ["view", "create", "str_replace", "insert", "delete", "rename"],
            },
            old_path=_TEXT,
            new_path=_TEXT,
            **_EDITS,
        ),
    ),
    "computer": (
        "Use a screen, mouse and keyboard: screenshot, left_click, type, key, mouse_move, scroll …",
        _schema(
            "action",
            action=_TEXT,
            coordinate=_POINT,
            start_coordinate=_POINT,
            text=_TEXT,
            scroll_direction=_TEXT,
            scroll_amount=_INTEGER,
            duration={"type": "number"},
        ),
    ),
}
"""Kind without its date → description and schema."""
_TOOLSETS = ("computer_toolset_", "browser_toolset_")
"""Kinds of many tools that run at the caller, and are described nowhere."""


def tool_warnings(ask: Tokens) -> tuple[str, ...]:
    """Return warnings about tools that are left out."""
    tools = current_tools(ask)
    left_out = {str(tool.get("type"))[:40] for tool in tools if _function(tool) is None}
    toolsets = {kind for kind in left_out if kind.startswith(_TOOLSETS)}
    warnings = [
        f"tools of type {', '.join(sorted(kinds))} {reason} and are left out"
        for kinds, reason in (
            (left_out - toolsets, "run at Anthropic"),
            (toolsets, "are known only to Anthropic's models"),
        )
        if kinds
    ]
    warnings += called_directly(tools)
    if ask.mcp_servers:
        warnings.append("mcp_servers has no effect: its tools run at Anthropic")
    return tuple(warnings)


def add_tools(body: dict[str, Any], ask: Tokens, model: Model) -> None:
    """Put the caller's own tools and the tool choice into the body.

    Agents (Claude Code) offer Anthropic's tools as well, so they are refused only if the choice requires one.

    Raises:
        Refusal: BAD_REQUEST for a tool without a name, or a choice that can't be met.
    """
    choice = ask.tool_choice or ToolChoice()
    if choice.type not in _MODES:
        raise bad_request("tool_choice.type must be auto, any, tool or none")
    tools = current_tools(ask)
    functions = [function for tool in tools if (function := _function(tool)) is not None]
    if choice.type == "tool":
        functions = [function for function in functions if function["name"] == choice.name]
        if not functions and tools:
            known = any(tool.get("name") == choice.name for tool in tools)
            text = f"tool_choice names {choice.name!r}, which runs at Anthropic and can't be called here"
            raise bad_request(text if known else unknown_tools_message([str(choice.name)]))
    if not functions:
        require_tools(_MODES[choice.type], tools)
        if choice.type == "any":
            raise bad_request("tool_choice requires a tool, but all of them run at Anthropic")
        return
    require_capability(model, "tools", "tools")
    body["tools"] = [{"type": "function", "function": function} for function in functions]
    body["tool_choice"] = _MODES[choice.type]
    if choice.disable_parallel_tool_use is not None:
        body["parallel_tool_calls"] = not choice.disable_parallel_tool_use


_MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


def _function(tool: Tool) -> Tool | None:
    """Return the function to offer to the model; None for a tool that runs at Anthropic.

    Raises:
        Refusal: BAD_REQUEST if it has no name, or an invalid schema.
    """
    kind, name, schema = tool.get("type"), tool.get("name"), tool.get("input_schema")
    description = str(tool.get("description") or "")
    if schema is None and kind not in (None, "custom"):
        base, _, date = str(kind).rpartition("_")
        if base not in _DEFINED or not date.isdigit():
            return None
        default, schema = _DEFINED[base]
        description = description or default
    schema = NO_ARGUMENTS if schema is None else schema
    if not isinstance(name, str) or not name:
        raise bad_request("every tool needs a name")
    if not isinstance(schema, dict | bool):
        raise bad_request(f"tool {name[:60]!r} has an input_schema that is not a JSON schema")
    description = _with_examples(description, tool.get("input_examples"))
    return {"name": name, "description": description, "parameters": schema}


def _with_examples(description: str, examples: object) -> str:
    """Return a tool's description with examples of its input, which templates have no other place for."""
    if not isinstance(examples, list) or not examples:
        return description
    inputs = (msgspec.json.encode(example).decode() for example in examples)
    return "\n".join(filter(None, (description, "Examples of its input:", *inputs)))
