"""Analyses templates of one exchange (System, Prompt, Response), which Ollama prints once for each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sollold.models.templates.go_parser import Assign, Branch, Expression, FunctionCall, Node, Operand, Print


def until_response(nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], bool]:
    """Return the nodes up to the one that prints the response, and whether there is one."""
    left: list[Node] = []
    for node in nodes:
        if isinstance(node, Print) and "Response" in field_names((node,)):
            return (*left, node), True
        if isinstance(node, Branch):
            body, found = until_response(node.body)
            other, also = ((), True) if found else until_response(node.other)
            left.append(replace(node, body=body, other=other))
            if found or (also and node.other):
                return tuple(left), True
            continue
        left.append(node)
    return tuple(left), False


def field_names(nodes: tuple[Node, ...]) -> frozenset[str]:
    """Return the first field name of every operand."""
    return frozenset(_names(nodes))


def _names(nodes: tuple[Node, ...]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Print | Assign | Branch):
            yield from _named(node.value)
        if isinstance(node, Branch):
            yield from _names(node.body)
            yield from _names(node.other)


def _named(value: Expression) -> Iterator[str]:
    if isinstance(value, FunctionCall):
        for argument in value.arguments:
            yield from _named(argument)
    elif isinstance(value, Operand):
        if value.fields and isinstance(value.base, str):
            yield value.fields[0]
        elif isinstance(value.base, FunctionCall):
            yield from _named(value.base)
