"""Explains what is wrong with a field of a request, in words for people instead of a decoder's."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from sollold.did_you_mean import did_you_mean
from sollold.out_of_range import out_of_range

_AT = re.compile(r"(.*) - at `\$\.?(.+?)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)
_NO_CHOICE = re.compile(r"Invalid enum value (.+)", re.DOTALL)


def explain(error: msgspec.ValidationError, type_: type) -> str:
    """Return why a value can't become a ``type_``, as ``field: what was expected``."""
    text = str(error)
    at = _AT.fullmatch(text)
    what, field = (at[1], at[2]) if at else (text, "")
    if wrong := _NO_CHOICE.fullmatch(what):
        choices = ", ".join(_choices(get_type_hints(type_).get(field)))
        what = f"{wrong[1]} is not one of {choices}" if choices else f"{wrong[1]} is not an allowed value"
    elif unknown := _UNKNOWN.fullmatch(what):
        names = type_.__struct_encode_fields__ if issubclass(type_, msgspec.Struct) and not field else ()
        what = f"unknown field {unknown[1]}{did_you_mean(unknown[1], names)}"
    elif beyond := out_of_range(what):
        what = beyond
    else:
        what = what[:1].lower() + what[1:].replace("`", "")
    return f"{field}: {what}" if field else what


def wrong_field(error: msgspec.ValidationError) -> str:
    """Return the name of the field whose value was refused; empty if there is none."""
    at = _AT.fullmatch(str(error))
    return at[2] if at else ""


def _choices(hint: Any) -> list[str]:
    """Return the values that a field of this type allows, if it is an enumeration."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(one.value) for one in hint]
    if get_origin(hint) is Literal:
        return [str(one) for one in get_args(hint) if one != ""]
    return [word for one in get_args(hint) for word in _choices(one)]
