"""Converts the tools of ``/v1/responses`` to functions that a model can call. Pure.

A caller's own tools are functions, custom tools (called with a string), the tools of a namespace (how agents
offer the tools of an MCP server) and a search for tools that the caller itself executes. Other kinds run at
OpenAI, and are not offered to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sollold.api.engine.fields import require_capability
from sollold.api.engine.tools import (
    NO_ARGUMENTS,
    called_directly,
    chosen_tools,
    require_tools,
    unknown_tools_message,
)
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.errors import bad_request
from sollold.facts import dataclass
from sollold.models.model import Model

Tool = dict[str, Any]

SEARCH = "tool_search"
_OWN_KINDS = ("function", "custom", SEARCH)
_TRAINED = frozenset(("apply_patch", "shell", "local_shell", "computer", "computer_use_preview"))
"""Kinds that run at the caller, without a schema."""
_TEXT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
"""The schema of a custom tool, whose input is a string; its grammar is not enforced."""


@dataclass(frozen=True, slots=True)
class OwnTool:
    """A tool that the caller runs.

    Attributes:
        kind: ``function``, ``custom`` or ``tool_search``.
        name: the caller's name for it.
        namespace: the namespace that contains it; empty for none.
        function: the function offered to the model, under the tool's full name.
    """

    kind: str
    name: str
    namespace: str
    function: Tool


def full_name(namespace: object, name: str) -> str:
    """Return a tool's name with its namespace, joined as agents do for APIs without namespaces."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace.rstrip('_')}__{name}"


def own_tools(ask: ResponseAsk) -> dict[str, OwnTool]:
    """Return the caller's own tools by full name, including those that a search has found.

    Raises:
        Refusal: BAD_REQUEST for a tool without a name.
    """
    found: dict[str, OwnTool] = {}
    for namespace, tool in _all_tools(ask):
        if _is_own(tool):
            own = _own_tool(namespace, tool)
            found.setdefault(own.function["name"], own)
    return found


def tool_warnings(ask: ResponseAsk) -> list[str]:
    """Return warnings about tools that are left out, and about grammars that are not enforced."""
    offered = [tool for _, tool in _all_tools(ask)]
    kinds = {_kind(tool)[:40] for tool in offered if not _is_own(tool)} - {SEARCH}
    warnings = [
        f"tools of type {', '.join(sorted(group))} {reason} and are left out"
        for group, reason in (
            (kinds - _TRAINED, "run at OpenAI"),
            (kinds & _TRAINED, "are known only to OpenAI's models"),
        )
        if group
    ]
    warnings += called_directly(offered)
    if any("format" in tool for tool in offered if _kind(tool) == "custom"):
        warnings.append("the grammar of a custom tool is not enforced")
    return warnings


def _all_tools(ask: ResponseAsk) -> Iterator[tuple[str, Tool]]:
    """Yield each tool with its namespace: the request's, then those in items of the input."""
    yield from _with_namespaces(ask.tools or ())
    for item in ask.input if isinstance(ask.input, list) else ():
        if item.get("type") in ("tool_search_output", "additional_tools"):
            tools = item.get("tools")
            yield from _with_namespaces(tools if isinstance(tools, list) else ())


def brought_names(item: Tool) -> list[str]:
    """Return the full names of the tools that a search has found."""
    tools = item.get("tools")
    pairs = _with_namespaces(tools if isinstance(tools, list) else ())
    return [full_name(namespace, str(tool.get("name"))) for namespace, tool in pairs if tool.get("name")]


def _with_namespaces(tools: Iterable[Any]) -> Iterator[tuple[str, Tool]]:
    for tool in tools:
        if not isinstance(tool, dict):
            continue
        members = tool.get("tools")
        if _kind(tool) != "namespace" or not isinstance(members, list):
            yield "", tool
            continue
        namespace = str(tool.get("name") or "")
        yield from ((namespace, member) for member in members if isinstance(member, dict))


def _kind(tool: Tool) -> str:
    return str(tool.get("type") or "function")


def _is_own(tool: Tool) -> bool:
    kind = _kind(tool)
    # OpenAI's own search finds tools whose loading is deferred; here all are offered from the start.
    return kind in _OWN_KINDS and (kind != SEARCH or tool.get("execution") == "client")


def _own_tool(namespace: str, tool: Tool) -> OwnTool:
    kind = _kind(tool)
    if isinstance(tool.get("function"), dict):
        # The form of chat completions.
        tool = tool["function"]
    name = SEARCH if kind == SEARCH else tool.get("name")
    if not isinstance(name, str) or not name:
        raise bad_request(f"a tool of type '{kind}' needs a name")
    parameters = _TEXT_SCHEMA if kind == "custom" else tool.get("parameters") or NO_ARGUMENTS
    function = {
        "name": full_name(namespace, name),
        "description": str(tool.get("description") or ""),
        "parameters": parameters,
    }
    return OwnTool(kind, name, namespace, function)


def add_tools(body: dict[str, Any], ask: ResponseAsk, model: Model) -> None:
    """Put the caller's own tools and the tool choice into the body.

    Agents (Codex) offer OpenAI's tools in every request, so they are refused only if the choice requires one.

    Raises:
        Refusal: BAD_REQUEST for a tool without a name, or a choice that can't be met.
    """
    offered = own_tools(ask)
    mode, names = chosen_tools(ask.tool_choice)
    if not offered:
        require_tools(mode, ask.tools)
        if ask.tools and (names is not None or mode == "required"):
            raise bad_request(
                "tool_choice requires a tool, but only your own functions can be called here; "
                f"the tools are {', '.join(sorted({_kind(tool)[:40] for tool in ask.tools}))}"
            )
        return
    require_capability(model, "tools", "tools")
    if names is not None:
        chosen = frozenset(names)
        offered = {name: own for name, own in offered.items() if not chosen.isdisjoint((name, own.name))}
        if not offered:
            raise bad_request(unknown_tools_message(names))
    body["tools"] = [{"type": "function", "function": own.function} for own in offered.values()]
    body["tool_choice"] = mode
