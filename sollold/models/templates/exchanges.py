"""Analyses templates of one exchange (System, Prompt, Response), which Ollama prints once for each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sollold.models.templates.go_parser import Assign, Branch, Expression, FunctionCall, Node, Operand, Print


def until_response(nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], bool]:
    """Return the nodes up to the one that prints the response, and whether there is one."""
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Print) and "Response" in field_names((node,)):
            return (*kept, node), True
        if isinstance(node, Branch):
            body, found = until_response(node.body)
            other_nodes, other_found = ((), True) if found else until_response(node.other)
            kept.append(replace(node, body=body, other=other_nodes))
            if found or (other_found and node.other):
                return tuple(kept), True
            continue
        kept.append(node)
    return tuple(kept), False


def field_names(nodes: tuple[Node, ...]) -> frozenset[str]:
    """Return the first field name of every operand."""
    return frozenset(_names(nodes))


def _names(nodes: tuple[Node, ...]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Print | Assign | Branch):
            yield from _operand_names(node.value)
        if isinstance(node, Branch):
            yield from _names(node.body)
            yield from _names(node.other)


def _operand_names(value: Expression) -> Iterator[str]:
    if isinstance(value, FunctionCall):
        for argument in value.arguments:
            yield from _operand_names(argument)
    elif isinstance(value, Operand):
        if value.fields and isinstance(value.base, str):
            yield value.fields[0]
        elif isinstance(value.base, FunctionCall):
            yield from _operand_names(value.base)
