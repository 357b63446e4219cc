"""Renders a caller's own ``template`` for a prompt and the turns before, as Ollama does. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import bad_request
from sollold.models.templates.exchanges import field_names, until_response
from sollold.models.templates.go_parser import Node, Operand, Print, TemplateError, parse_template
from sollold.models.templates.go_render import render_nodes

_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("System", "Prompt", "Response", "Suffix", "Think", "ThinkLevel", "IsThinkSet"), ""),
    "First": True,
    "Messages": [],
    "Tools": [],
}


def render_template(template: str, values: Mapping[str, Any], turns: Sequence[tuple[str, str]] = ()) -> str:
    """Render ``template`` up to the response; ``values``: ``System``, ``Prompt``, ``Suffix``, ``Think`` …

    ``turns``: role and content of the turns before.

    Raises:
        Refusal: BAD_REQUEST naming the part that is not supported.
    """
    values = {**_DEFAULTS, **values}
    conversation = _conversation(values, turns)
    try:
        nodes = parse_template(template)
        if "Messages" in field_names(nodes):
            return render_nodes(nodes, {**values, "Messages": _messages(conversation)})
        return _exchanges(nodes, values, conversation)
    except TemplateError as error:
        raise bad_request(f'template: {error}; or render the prompt yourself and send "raw": true') from None


def _conversation(values: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    system = [("system", values["System"])] if values["System"] else []
    return [*system, *turns, ("user", values["Prompt"])]


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    rest = {"Thinking": "", "ToolCalls": [], "ToolName": "", "ToolCallID": "", "Images": []}
    return [{"Role": role, "Content": content, **rest} for role, content in turns]


_FIELDS = {"system": "System", "user": "Prompt", "assistant": "Response"}
_FOLLOWING = {"System": ("Prompt", "Response"), "Prompt": ("Response",), "Response": ()}
"""Fields of an exchange that must still be empty when this one is added; otherwise a new exchange begins."""


def _exchanges(nodes: tuple[Node, ...], values: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> str:
    """Render a template of one exchange for each exchange, and for the last one up to its response.

    Consecutive turns of one role are joined, as in Ollama.
    """
    if "Response" not in field_names(nodes):
        nodes = (*nodes, Print(Operand(".", ("Response",))))
    printed: list[str] = []
    exchange: dict[str, list[str]] = {}

    def render(nodes: tuple[Node, ...]) -> str:
        fields = {name: "\n\n".join(exchange.get(name, ())) for name in _FOLLOWING}
        return render_nodes(nodes, {**values, **fields, "First": not printed})

    for role, content in turns:
        name = _FIELDS.get(role, "Prompt")
        if any(field in exchange for field in _FOLLOWING[name]):
            printed.append(render(nodes))
            exchange = {}
        if content or name in exchange:
            exchange.setdefault(name, []).append(content)
    last, _ = until_response(nodes)
    return "".join([*printed, render(last)])
