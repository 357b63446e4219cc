"""Explains what is wrong with a field of a request, in plain words instead of a decoder's."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from sollold.did_you_mean import did_you_mean
from sollold.out_of_range import out_of_range

_LOCATED = re.compile(r"(.*) - at `\$\.?(.+?)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)
_KEPT_CHARACTERS = 500
"""Characters that are kept at either end of a long message."""
_BAD_CHOICE = re.compile(r"Invalid enum value (.+)", re.DOTALL)


def explain(error: msgspec.ValidationError, type_: type) -> str:
    """Return why a value can't become a ``type_``, as ``field: what was expected``."""
    text = _text_of(error)
    located = _LOCATED.fullmatch(text)
    problem, field = (located[1], located[2]) if located else (text, "")
    if wrong := _BAD_CHOICE.fullmatch(problem):
        choices = ", ".join(_choices(get_type_hints(type_).get(field)))
        problem = f"{wrong[1]} is not one of {choices}" if choices else f"{wrong[1]} is not an allowed value"
    elif unknown := _UNKNOWN.fullmatch(problem):
        names = type_.__struct_encode_fields__ if issubclass(type_, msgspec.Struct) and not field else ()
        problem = f"unknown field {unknown[1]}{did_you_mean(unknown[1], names)}"
    elif range_problem := out_of_range(problem):
        problem = range_problem
    else:
        problem = problem[:1].lower() + problem[1:].replace("`", "")
    return f"{field}: {problem}" if field else problem


def wrong_field(error: msgspec.ValidationError) -> str:
    """Return the name of the field whose value was refused; empty if there is none."""
    located = _LOCATED.fullmatch(_text_of(error))
    return located[2] if located else ""


def _text_of(error: msgspec.ValidationError) -> str:
    """Return the decoder's message, shortened in the middle: it may quote megabytes of the request."""
    text = str(error)
    return (
        text if len(text) <= 2 * _KEPT_CHARACTERS else f"{text[:_KEPT_CHARACTERS]}…{text[-_KEPT_CHARACTERS:]}"
    )


def _choices(hint: Any) -> list[str]:
    """Return the values that a field of this type allows, if it is an enumeration."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(member.value) for member in hint]
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint) if choice != ""]
    return [word for argument in get_args(hint) for word in _choices(argument)]
