"""Resolves references within a JSON schema. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

_ANCHORS = ("$anchor", "$dynamicAnchor")


def at_pointer(document: Any, target: str) -> dict[str, Any] | None:
    """Return the schema at a JSON pointer in a fragment (``#/$defs/a``); None if there is none."""
    place: Any = document
    for part in unquote(target[2:]).split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and key in place:
            place = place[key]
        elif isinstance(place, list) and key.isascii() and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return place if isinstance(place, dict) else None


def anchors_in(document: Any) -> dict[str, dict[str, Any]]:
    """Return the schemas that have an anchor, by anchor."""
    found: dict[str, dict[str, Any]] = {}
    places: list[Any] = [document]
    while places:
        place = places.pop()
        if isinstance(place, dict):
            for key in _ANCHORS:
                if isinstance(name := place.get(key), str) and name:
                    found.setdefault(name, place)
            places += place.values()
        elif isinstance(place, list):
            places += place
    return found
