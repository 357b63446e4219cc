"""Readable text for msgspec's errors about numbers out of range."""

from __future__ import annotations

import re

_RANGE_ERROR = re.compile(r"Expected `\w+` ([<>]=?) (\S+)")
_RANGES = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than"}


def out_of_range(error: str) -> str:
    """Return ``must be at most 64`` for the error "Expected `int` <= 64"; empty for any other error."""
    match = _RANGE_ERROR.match(error)
    return f"must be {_RANGES[match[1]]} {match[2]}" if match else ""
