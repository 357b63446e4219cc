"""Explains what is wrong with a setting's value, in plain words instead of a decoder's."""

from __future__ import annotations

import json
import re

from sollold.out_of_range import out_of_range

_OTHER_TYPE = re.compile(r"Expected `(\w+)`, got `\w+`(?: - at `\$(.*)`)?")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a quoted string",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
_KINDS: dict[type, str] = {list: "a list", dict: "a table"}
_UNQUOTED = {"int": r"\d+", "float": r"\d+(\.\d+)?", "bool": "true|false"}
"""Pattern of strings that would be valid without their quotes, by the expected type."""


def in_words(fault: str, value: object, *, secret: bool = False) -> str:
    """Rephrase msgspec's ``fault`` about ``value``, which is not shown if it is ``secret``."""
    if words := out_of_range(fault):
        return words
    match = _OTHER_TYPE.fullmatch(fault)
    if match is None or match[1] not in _TYPES:
        return fault
    expected, place = match[1], match[2] or ""
    found = _item_at(value, place)
    subject = "each of its values " if place else ""
    words = f"{subject}must be {_TYPES[expected]}"
    if secret or place == "[...]":
        return words
    words += f", not {_shown(found)}"
    if isinstance(found, str) and expected == "array":
        words += f"; write [{_shown(found)}]"
    elif isinstance(found, str) and re.fullmatch(_UNQUOTED.get(expected, "(?!)"), found):
        words += f"; write {found}"
    return words


def _item_at(value: object, place: str) -> object:
    """Return the list item at ``place``, or else the whole value."""
    index = re.fullmatch(r"\[(\d+)\]", place)
    return value[int(index[1])] if index and isinstance(value, (list, tuple)) else value


def _shown(value: object) -> str:
    if isinstance(value, (bool, str, int, float)):
        return json.dumps(value, ensure_ascii=False)
    return _KINDS.get(type(value), f"a {type(value).__name__}")
