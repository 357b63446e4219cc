"""A caller's own ``template``: what Ollama prints of it for a prompt and the turns before. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import Fault, Refusal
from sollold.models.templates.exchanges import field_names, until_response
from sollold.models.templates.go_parser import Node, Operand, Print, TemplateError, parse_template
from sollold.models.templates.go_render import render_nodes

_NONE: dict[str, Any] = {
    **dict.fromkeys(("System", "Prompt", "Response", "Suffix", "Think", "ThinkLevel", "IsThinkSet"), ""),
    "First": True,
    "Messages": [],
    "Tools": [],
}


def render_template(template: str, values: Mapping[str, Any], turns: Sequence[tuple[str, str]] = ()) -> str:
    """``template`` with ``values`` (``System``, ``Prompt``, ``Suffix``, ``Think`` …) up to the response.

    ``turns``: role and content of what was said before.

    Raises:
        Refusal: BAD_REQUEST naming the part that is not supported.
    """
    values = {**_NONE, **values}
    said = _conversation(values, turns)
    try:
        nodes = parse_template(template)
        if "Messages" in field_names(nodes):
            return render_nodes(nodes, {**values, "Messages": _messages(said)})
        return _exchanges(nodes, values, said)
    except TemplateError as error:
        raise Refusal(
            Fault.BAD_REQUEST, f'template: {error}; or render the prompt yourself and send "raw": true'
        ) from None


def _conversation(values: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    system = [("system", values["System"])] if values["System"] else []
    return [*system, *turns, ("user", values["Prompt"])]


def _messages(said: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    rest = {"Thinking": "", "ToolCalls": [], "ToolName": "", "ToolCallID": "", "Images": []}
    return [{"Role": role, "Content": content, **rest} for role, content in said]


_FIELDS = {"system": "System", "user": "Prompt", "assistant": "Response"}
_AFTER = {"System": ("Prompt", "Response"), "Prompt": ("Response",), "Response": ()}
"""What an exchange can't have already when this is said in it."""
_NOTHING = dict.fromkeys(_AFTER, "")


def _exchanges(nodes: tuple[Node, ...], values: Mapping[str, Any], said: Sequence[tuple[str, str]]) -> str:
    """A template of one exchange, printed for each of them, and for the last as far as its response.

    Neighbours of one role are joined, as Ollama does.
    """
    if "Response" not in field_names(nodes):
        nodes = (*nodes, Print(Operand(".", ("Response",))))
    printed: list[str] = []
    exchange = dict(_NOTHING)
    for role, content in said:
        name = _FIELDS.get(role, "Prompt")
        if any(exchange[later] for later in _AFTER[name]):
            printed.append(render_nodes(nodes, {**values, **exchange, "First": not printed}))
            exchange = dict(_NOTHING)
        exchange[name] = f"{exchange[name]}\n\n{content}" if exchange[name] else content
    last, _ = until_response(nodes)
    return "".join([*printed, render_nodes(last, {**values, **exchange, "First": not printed})])
