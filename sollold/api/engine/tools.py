"""Normalizes tools and tool calls to the one form that engines accept. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sollold.api.http.json_text import decode_text
from sollold.errors import bad_request
from sollold.undecodable import UNDECODABLE

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""The schema of a function without arguments."""


def normalize_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Convert tools to ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    Accepts all clear forms: no ``type``, a flat object, nulls, ``input_schema``, a schema as a string.

    Raises:
        Refusal: BAD_REQUEST naming the tool that is not a function, or has no name or no valid schema.
    """
    return [_normalize_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _normalize_tool(tool: Any, location: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise bad_request(f"{location} is not an object")
    function = tool.get("function")
    fields = function if isinstance(function, dict) else tool
    name = fields.get("name")
    kind = tool.get("type") or "function"
    if kind != "function":
        quoted = f' ("{str(name)[:60]}")' if name else ""
        raise bad_request(
            f'{location}{quoted} is of type "{str(kind)[:40]}"; only tools of type "function" are supported'
        )
    if not isinstance(name, str) or not name.strip():
        raise bad_request(f"{location} has no function name")
    rest = {key: value for key, value in fields.items() if key not in _TOOL_FIELDS and value is not None}
    description = fields.get("description")
    if description is not None:
        rest["description"] = description if isinstance(description, str) else str(description)
    schema = fields.get("parameters", fields.get("input_schema"))
    if schema is not None:
        rest["parameters"] = _schema_of(schema, f'{location} ("{name[:60]}")')
    return {"type": "function", "function": {"name": name, **rest}}


_TOOL_FIELDS = ("type", "name", "description", "parameters", "input_schema", "function", "cache_control")


def _schema_of(schema: Any, location: str) -> dict[str, Any]:
    if isinstance(schema, str) and schema.strip():
        try:
            schema = decode_text(schema)
        except UNDECODABLE:
            raise bad_request(f"{location}: parameters are not a JSON schema") from None
    if schema is True or schema in ("", [], {}):
        return dict(NO_ARGUMENTS)
    if not isinstance(schema, dict):
        raise bad_request(f"{location}: parameters are not a JSON schema (an object)")
    return schema


def unconstrained_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return ``tool`` with any arguments, and its schema in the description."""
    function = tool["function"]
    schema = function.get("parameters")
    if schema is None:
        return tool
    arguments = f"Arguments (JSON schema): {msgspec.json.encode(schema).decode()}"
    described = "\n".join(text for text in (function.get("description"), arguments) if text)
    return {**tool, "function": {**function, "description": described, "parameters": {"type": "object"}}}


def normalize_tool_call(call: Any, index: int) -> dict[str, Any]:
    """Normalize a tool call of the history; its arguments become a string with a JSON object.

    Raises:
        Refusal: BAD_REQUEST if it names no function.
    """
    location = f"tool_calls[{index}]"
    if not isinstance(call, dict):
        raise bad_request(f"{location} is not an object")
    function: dict[str, Any] = next(
        (value for key in ("function", "custom") if isinstance(value := call.get(key), dict)), call
    )
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{location} needs a function with a name")
    arguments = function.get("arguments", function.get("input"))
    if "custom" in call:
        arguments = {"input": arguments}
    id_ = call.get("id")
    return {
        "id": id_ if isinstance(id_, str) and id_ else f"call_{index}",
        "type": "function",
        "function": {"name": name, "arguments": arguments_text(arguments)},
    }


def arguments_text(arguments: Any) -> str:
    """Return arguments as a string with a JSON object; any other value becomes its member ``arguments``."""
    value = arguments
    if isinstance(arguments, str):
        if not arguments.strip():
            return "{}"
        try:
            value = decode_text(arguments)
        except UNDECODABLE:
            value = {"arguments": arguments}
        else:
            if isinstance(value, dict):
                return arguments
    if value is None:
        return "{}"
    return msgspec.json.encode(value if isinstance(value, dict) else {"arguments": value}).decode()


def normalize_history(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Normalize the tool calls in ``messages``; the older ``function_call`` and role ``function`` too.

    Raises:
        Refusal: BAD_REQUEST, as `normalize_tool_call`.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls")
        old = message.get("function_call")
        if isinstance(old, dict):
            message = {key: value for key, value in message.items() if key != "function_call"}
            calls = calls or [{"id": f"call_{old.get('name')}", "function": old}]
        if isinstance(calls, list) and calls:
            normalized = [normalize_tool_call(call, index) for index, call in enumerate(calls)]
            message = {**message, "tool_calls": normalized}
        elif calls is not None:
            message = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("role") == "function":
            message = {"tool_call_id": f"call_{message.get('name')}", **message, "role": "tool"}
        out.append(message)
    return out


def chosen_tools(choice: object) -> tuple[str, list[str] | None]:
    """Return the mode of a ``tool_choice`` (``auto``, ``required``, ``none``) and its tools; None for all.

    Raises:
        Refusal: BAD_REQUEST if it is invalid.
    """
    if not isinstance(choice, dict):
        return _mode(choice), None
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        entries = tools if isinstance(tools, list) else ()
        mode = "required" if isinstance(allowed, dict) and allowed.get("mode") == "required" else "auto"
        return mode, [_tool_name(tool) for tool in entries if isinstance(tool, dict)]
    name = _tool_name(choice)
    if name in _MODES:
        # A mode in an object, as Anthropic has it.
        return _mode(name), None
    return "required", [name]


_MODES = {"auto": "auto", "required": "required", "none": "none", "any": "required"}
"""Modes → OpenAI's words for them; ``any`` is Mistral's and Anthropic's."""


def _mode(choice: object) -> str:
    if choice is None or choice == "":
        return "auto"
    if not isinstance(choice, str) or choice not in _MODES:
        raise bad_request("tool_choice is auto, required, none or a function")
    return _MODES[choice]


def require_tools(mode: str, tools: object) -> None:
    """Check that there are tools if ``mode`` requires a call.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if mode == "required" and not tools:
        raise bad_request("tool_choice requires a call, but there are no tools", field="tool_choice")


def called_directly(tools: Iterable[dict[str, Any]]) -> list[str]:
    """Return a warning if a caller's tool is meant to be called only by code that runs elsewhere."""
    callers = (tool.get("allowed_callers") for tool in tools)
    if not any(isinstance(names, list) and names and "direct" not in names for names in callers):
        return []
    return ["allowed_callers has no effect: the model calls tools directly, since it runs no code here"]


def unknown_tools_message(names: Sequence[str]) -> str:
    """Return an error message about ``names`` that no tool has."""
    listed = ", ".join(repr(name[:60]) for name in names)
    return f"tool_choice names {listed}, which is not among the tools"


def _tool_name(tool: dict[str, Any]) -> str:
    """Return the function's name; for OpenAI's built-in tools, which have none, the type."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return str(tool.get("type") if name is None else name)
