"""Resolves references within a JSON schema. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

_ANCHORS = ("$anchor", "$dynamicAnchor")


def at_pointer(document: Any, target: str) -> dict[str, Any] | None:
    """Return the schema at a JSON pointer in a fragment (``#/$defs/a``); None if there is none."""
    node: Any = document
    for part in unquote(target[2:]).split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isascii() and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node if isinstance(node, dict) else None


def anchors_in(document: Any) -> dict[str, dict[str, Any]]:
    """Return the schemas that have an anchor, by anchor."""
    found: dict[str, dict[str, Any]] = {}
    pending: list[Any] = [document]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            for key in _ANCHORS:
                if isinstance(name := node.get(key), str) and name:
                    found.setdefault(name, node)
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return found
