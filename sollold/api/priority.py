"""Whose turn it should be: the priority that a request names, 1 (may wait) to 10 (now).

The order of what is believed: the header ``X-Sollold-Priority``, the body's ``priority``, the role in
``X-Sollold-Role``, else 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from sollold.serving.ask import Fault, Refusal

NORMAL = 5

NAMES: Mapping[str, int] = {
    "BATCH": 1,
    "LOWEST": 2,
    "LOW": 3,
    "BELOW_NORMAL": 4,
    "NORMAL": 5,
    "ABOVE_NORMAL": 6,
    "HIGH": 7,
    "HIGHER": 8,
    "URGENT": 9,
    "CRITICAL": 10,
}

ROLES: Mapping[str, int] = {
    "researcher": 8,
    "analyst": 8,
    "assistant": 8,
    "qa": 8,
    "critic": 7,
    "reviewer": 7,
    "editor": 6,
    "summarizer": 5,
    "classifier": 5,
    "extractor": 5,
    "indexer": 3,
    "crawler": 3,
    "background": 2,
    "batch": 1,
}


def parse_priority(value: object) -> int:
    """1 to 10 from a number, its digits, or a name such as ``HIGH``.

    Raises:
        Refusal: BAD_REQUEST, with the names that there are.
    """
    if isinstance(value, bool):
        number = None
    elif isinstance(value, int):
        number = value
    elif isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit() and len(text) < 4:
            number = int(text)
        else:
            number = NAMES.get(text.upper().replace("-", "_").replace(" ", "_"))
    else:
        number = None
    if number is None or not 1 <= number <= 10:
        shown = str(value)[:40]
        raise Refusal(
            Fault.BAD_REQUEST,
            f"priority {shown!r} is not known; write a number from 1 to 10 or one of {', '.join(NAMES)}",
        )
    return number


def priority_of(header: str | None, field: object, role: str | None) -> int:
    """The priority of a request; ``None`` for what it does not name.

    A role that is not in the table counts as 5: roles are free words of the callers.

    Raises:
        Refusal: BAD_REQUEST, when a priority is named that is none.
    """
    if header is not None and header.strip():
        return parse_priority(header)
    if field is not None:
        return parse_priority(field)
    if role is not None:
        return ROLES.get(role.strip().lower(), NORMAL)
    return NORMAL
